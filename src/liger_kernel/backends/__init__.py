"""Which implementation of an op serves which device.

An implementation is `liger_kernel.ops.<op>.<backend>`, a module with `forward` and `backward` (the contract is in
`liger_kernel._core.autograd`). A device without a file of its own gets the op's `reference`, recomputed in backward.

Order of decision: `use_implementation(...)` (a context manager), the environment variable `LIGER_KERNEL_IMPL` (read at
import), the device of the tensor. An explicit request that cannot be served raises.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import os
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from liger_kernel._core.autograd import Recompute
from liger_kernel.backends import triton as _triton

REFERENCE = "reference"
#: backend name -> its description; the order is the order of preference
BACKENDS = {"triton": _triton}
#: what other packages may put into LIGER_KERNEL_IMPL for the incumbent: accepted, without effect
_FOREIGN = ("ascend", "cute", "cutedsl", "cutile")


def _from_environment() -> str | None:
    name = os.environ.get("LIGER_KERNEL_IMPL", "").strip().lower() or None
    if name in _FOREIGN:
        warnings.warn(
            f"LIGER_KERNEL_IMPL={name!r} names a backend of another package; choosing by device instead.",
            stacklevel=2,
        )
        return None
    return _checked(name)


def _checked(name: str | None) -> str | None:
    if name is not None and name != REFERENCE and name not in BACKENDS:
        raise RuntimeError(
            f"Unknown LIGER_KERNEL_IMPL={name!r}; known: {', '.join(sorted([REFERENCE, *BACKENDS]))}."
        )
    return name


_requested: str | None = _from_environment()


@contextlib.contextmanager
def use_implementation(name: str | None) -> Iterator[None]:
    """Serve every op by the backend `name` ("reference", "triton"; None: choose by device) inside the block."""
    global _requested
    before, _requested = _requested, _checked(name)
    try:
        yield
    finally:
        _requested = before


def backend_for(device_type: str, requested: str | None = None) -> str:
    """Name of the backend that serves `device_type`; raises RuntimeError if `requested` cannot."""
    if requested == REFERENCE:
        return REFERENCE
    for name, backend in BACKENDS.items():
        if requested is None and device_type not in backend.DEVICE_TYPES:
            continue
        if requested in (None, name):
            reason = backend.unavailable(device_type)
            if reason is None:
                return name
            if requested is not None:
                raise RuntimeError(
                    f"LIGER_KERNEL_IMPL={name!r} cannot serve a tensor on {device_type!r}: {reason}. "
                    f"Unset it, or use LIGER_KERNEL_IMPL=reference."
                )
    return REFERENCE


@functools.cache
def _implementation(op: str, device_type: str, requested: str | None) -> Any:
    name = backend_for(device_type, requested)
    package = f"liger_kernel.ops.{op}"
    if name != REFERENCE and (
        importlib.util.find_spec(f"{package}.{name}") is not None or requested is not None
    ):
        return importlib.import_module(f"{package}.{name}")
    return Recompute(getattr(importlib.import_module(f"{package}.reference"), op))


def host_bound(x: Tensor, limit: int, elements: int | None = None) -> bool:
    """Whether `elements` (of `x`) on a GPU are at most `limit`: so few that PyTorch's own C++ ops, if few, are faster.

    There the kernels take a few microseconds, and Python most of the time: on the H200 machine a no-op
    `autograd.Function` costs 109 us forward and backward, eager `silu(a) * b` 132 us. Never so where an implementation
    was asked for by name.
    """
    size = x.numel() if elements is None else elements
    return _requested is None and size <= limit and x.device.type in _triton.DEVICE_TYPES


def implementation(op: str, x: Tensor) -> Any:
    """The object with `forward` and `backward` that computes `op` for tensors like `x`.

    Kernels compute in fp32, so float64 is left to the reference; asking a kernel for it raises RuntimeError.
    """
    requested = _requested
    if x.dtype == torch.float64:
        if requested not in (None, REFERENCE):
            raise RuntimeError(
                f"LIGER_KERNEL_IMPL={requested!r} computes in float32 and cannot serve float64; "
                f"convert the tensors with .to(), or use LIGER_KERNEL_IMPL=reference."
            )
        requested = REFERENCE
    return _implementation(op, x.device.type, requested)
