"""Devices: what they are like, and which files of an op compute on them.

Each file here that defines `BACKEND` is a family of devices. An implementation is a set of op files,
`liger_kernel.ops.<op>.<implementation>`, that satisfy the op's `contract.py`; an op without such a file, and a device
without a backend, run the op's `reference`.

Order of decision: `use_implementation(...)` (a context manager) or `set_implementation(...)`, the environment variable
`LIGER_KERNEL_IMPL` (read at import), the device of the tensor. An explicit request that cannot be served raises.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import os
import pkgutil
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from liger_kernel._core.autograd import Recompute, has_numbers
from liger_kernel._core.contract import check_contract
from liger_kernel._core.lazy import compat_names
from liger_kernel.backends import disabled
from liger_kernel.backends.capability import NAMES
from liger_kernel.backends.capability import Capability as Capability
from liger_kernel.backends.records import Backend, DeviceFacts, Implementation, no_guard

REFERENCE, PORTABLE = "reference", "portable"
#: files of this folder that are no backend
_SHARED = (
    "capability",
    "clusters",
    "disabled",
    "dispatch",
    "graphs",
    "inductor",
    "kernels",
    "products",
    "records",
    "triton",
)
#: what other packages may put into LIGER_KERNEL_IMPL for the incumbent: accepted, without effect
_FOREIGN = ("ascend", "cute", "cutedsl", "cutile")

#: every family of devices, by name
BACKENDS: dict[str, Backend] = {}
#: every set of op files that a backend names
IMPLEMENTATIONS: dict[str, Implementation] = {}
#: of a device type without a backend: the reference computes there
_UNKNOWN = Backend("unknown", (), lambda device: DeviceFacts(queues=True))


def register(backend: Backend) -> None:
    """Add a family of devices; one of the same name is replaced.

    Raises: ValueError if another family has the facts of a device type that this one claims.
    """
    for other in BACKENDS.values():
        claimed = set(backend.device_types) & set(other.device_types)
        both = all(b.facts is not None and b.present() for b in (backend, other))
        if claimed and both and other.name != backend.name:
            raise ValueError(
                f"The backends {other.name!r} and {backend.name!r} both have the facts of {claimed.pop()!r} devices. "
                f"Give one of them facts=None, if it only computes there on request, or a `present` of its own."
            )
    BACKENDS[backend.name] = backend
    for implementation in (backend.implementation, *backend.on_request):
        if implementation is not None:
            IMPLEMENTATIONS[implementation.name] = implementation
    forget()


def forget() -> None:
    """Look again at backends, devices and the list of disabled ops."""
    for cache in (backend_of, facts_of, _disabled, _served_alike, _kernels):
        cache.cache_clear()


def _here(device_type: str) -> Iterator[Backend]:
    return (b for b in BACKENDS.values() if device_type in b.device_types and b.present())


@functools.cache
def backend_of(device_type: str) -> Backend:
    """The family that tensors on `device_type` belong to on this machine."""
    return next((b for b in _here(device_type) if b.facts is not None), _UNKNOWN)


@functools.cache
def facts_of(device: torch.device) -> DeviceFacts:
    runtime: Any = getattr(torch, device.type, None)
    absent = hasattr(runtime, "is_available") and not runtime.is_available()
    # a fake tensor may be on a device that this machine has not
    facts = (_UNKNOWN if absent else backend_of(device.type)).facts
    assert facts is not None
    return facts(device)


def can_look(x: Tensor) -> bool:
    """Whether the host may read a number of x: it is there, and no device has to be waited for."""
    return has_numbers(x) and not facts_of(x.device).queues


def device_guard(device: torch.device) -> AbstractContextManager[object]:
    """Make `device` current for the launches inside."""
    return facts_of(device).guard(device)


def is_capturing(device: torch.device) -> bool:
    """Whether a graph of the device's work is being captured, in which the host can wait for nothing."""
    streams: Any = facts_of(device).streams
    return streams is not None and streams.is_current_stream_capturing()


@functools.cache
def can_assert(device_type: str) -> bool:
    """Whether the device can stop at a wrong number by itself: MPS can since torch 2.14, Ascend's NPUs cannot."""
    key = torch._C._dispatch_key_for_device(device_type)
    return torch._C._dispatch_has_kernel_for_dispatch_key("aten::_assert_async.msg", key)


@contextlib.contextmanager
def on_paper(facts: DeviceFacts, kernels: bool = False) -> Iterator[None]:
    """Let tensors of the meta device stand for those of a device with these facts.

    kernels: whether ops allocate what those of Triton allocate, where it is installed; none is started.
    """
    triton, files = IMPLEMENTATIONS["triton"], None
    if kernels:
        facts = replace(facts, streams=None, graphs=None, guard=no_guard)
        if importlib.util.find_spec("triton") is not None:
            files = replace(triton, unavailable=lambda device: None)
    register(Backend("paper", ("meta",), lambda device: facts, implementation=files))
    try:
        yield
    finally:
        del BACKENDS["paper"]
        IMPLEMENTATIONS["triton"] = triton
        forget()


# --- explicit requests ----------------------------------------------------------------------------


def _checked(name: str | None) -> str | None:
    known = sorted([REFERENCE, *IMPLEMENTATIONS])
    if name is not None and name not in known:
        raise RuntimeError(f"Unknown LIGER_KERNEL_IMPL={name!r}; known: {', '.join(known)}.")
    return name


def _from_environment() -> str | None:
    name = os.environ.get("LIGER_KERNEL_IMPL", "").strip().lower() or None
    if name in _FOREIGN:
        warnings.warn(
            f"LIGER_KERNEL_IMPL={name!r} names a backend of another package; choosing by device instead.",
            stacklevel=2,
        )
        return None
    return _checked(name)


def set_implementation(name: str | None) -> None:
    """`use_implementation` from now on."""
    global _requested
    _requested = _checked(name)


@contextlib.contextmanager
def use_implementation(name: str | None) -> Iterator[None]:
    """Serve every op by the files `name` ("reference", "triton", "npu"; None: choose by device) inside the block."""
    before = _requested
    set_implementation(name)
    try:
        yield
    finally:
        set_implementation(before)


def requested() -> str | None:
    """The implementation that was asked for by name, if one was."""
    return _requested


def kernels_requested() -> bool:
    """Whether an implementation other than the reference, compiled or not, was requested by name."""
    found = IMPLEMENTATIONS.get(_requested or REFERENCE)
    return found is not None and found.compiled is None


def host_bound(x: Tensor, limit: int) -> bool:
    """Whether `limit` is not exceeded by the elements of `x`: so few that PyTorch's own C++ ops, if few, are faster.

    On a GPU the kernels take a few microseconds there, and Python most of the time: on the H200 machine a no-op
    `autograd.Function` costs 109 us forward and backward, eager `silu(a) * b` 132 us. Never so where an implementation
    was requested by name, nor in `host_is_free`.
    """
    if _requested is not None or _host_is_free or x.numel() > limit:
        return False
    facts = facts_of(x.device)
    return facts.queues and facts.small_by_torch


_host_is_free = False


@contextlib.contextmanager
def host_is_free() -> Iterator[None]:
    """While what is queued is captured, to be started by one call later: only the device's time counts."""
    global _host_is_free
    before, _host_is_free = _host_is_free, True
    try:
        yield
    finally:
        _host_is_free = before


# --- who computes ---------------------------------------------------------------------------------


def implementation_for(device_type: str, requested: str | None = None) -> Implementation | None:
    """The op files that serve `device_type`, None for the reference; raises RuntimeError if `requested` cannot."""
    backend = backend_of(device_type)
    if requested is None:
        default = backend.implementation
        return default if default is None or default.unavailable(device_type) is None else None
    if requested == REFERENCE:
        return None
    found = IMPLEMENTATIONS[requested]
    reason = found.unavailable(device_type)
    offered = (i for b in _here(device_type) for i in (b.implementation, *b.on_request))
    if reason is None and found not in offered:
        reason = "no backend of this device offers it"
    if reason is not None:
        raise RuntimeError(
            f"LIGER_KERNEL_IMPL={requested!r} cannot serve a tensor on {device_type!r}: {reason}. "
            f"Unset it, or use LIGER_KERNEL_IMPL=reference."
        )
    return found


def computed_by(device_type: str) -> str:
    """Name of the implementation that serves `device_type` as things are; "reference" where there is none."""
    try:
        found = implementation_for(device_type, _requested)
    except RuntimeError as refused:
        return f"nothing: {refused}"
    return REFERENCE if found is None else found.name


def is_there(module: str) -> bool:
    """Whether a module can be imported, without importing it."""
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # not even its package
        return False


def devices_of(device_type: str) -> list[torch.device]:
    """Every device of this type that the process sees; a meta tensor is on none."""
    if device_type == "meta":
        return []
    count = 1 if device_type == "cpu" else torch.get_device_module(device_type).device_count()
    return [torch.device(device_type, i) for i in range(count)]


@functools.cache
def _disabled(device_type: str) -> dict[tuple[str, str], str]:
    return disabled.reasons({facts_of(device).name for device in devices_of(device_type)})


def serving(op: str, device_type: str, requested: str | None = None) -> tuple[str, str | None]:
    """What computes `op` on `device_type`: an implementation, "portable" or "reference"; and why that is not the
    implementation of the device, if selftest found it wrong.

    Raises: RuntimeError if `requested` cannot serve.
    """
    found, why = implementation_for(device_type, requested), None
    if found is not None and is_there(found.module(op)):
        why = _disabled(device_type).get((op, found.name))
        if why is None:
            return found.name, None
        if requested is not None:
            raise RuntimeError(
                f"LIGER_KERNEL_IMPL={requested!r} cannot serve {op}: selftest found it wrong here ({why}), which "
                f"{disabled.path()} says. Unset the variable, or: {disabled.RESET}"
            )
    if is_there(f"liger_kernel.ops.{op}.{PORTABLE}"):
        return PORTABLE, why
    return (REFERENCE if found is None or found.compiled is None else found.name), why


def served_alike(ops: tuple[str, ...], device_type: str) -> bool:
    """Whether one implementation computes all of these ops, or the reference does."""
    return _served_alike(ops, device_type, _requested)


@functools.cache
def _served_alike(ops: tuple[str, ...], device_type: str, requested: str | None) -> bool:
    return len({serving(op, device_type, requested)[0] for op in ops}) == 1


@functools.cache
def _kernels(op: str, device_type: str, requested: str | None) -> Any:
    name, why = serving(op, device_type, requested)
    if why is not None:
        warnings.warn(
            f"{op} is computed without its kernels on {device_type!r}: selftest found them wrong here ({why}), which "
            f"{disabled.path()} says. {disabled.RESET}",
            stacklevel=2,
        )
    package = f"liger_kernel.ops.{op}"
    compiled = IMPLEMENTATIONS[name].compiled if name in IMPLEMENTATIONS else None
    if name == REFERENCE or compiled is not None:
        function = getattr(importlib.import_module(f"{package}.{REFERENCE}"), op)
        return Recompute(function if compiled is None else compiled(function))
    contract = importlib.import_module(f"{package}.contract").Kernels
    module = f"{package}.{name}" if name == PORTABLE else IMPLEMENTATIONS[name].module(op)
    return check_contract(importlib.import_module(module), contract, module)


def reference_of(op: str, x: Tensor) -> Any:
    """What computes `op` on the device of `x` without files for it."""
    return _kernels(op, x.device.type, REFERENCE)


def kernels_of(op: str, x: Tensor) -> Any:
    """What computes `op` for tensors like `x`; it satisfies `Kernels` of the op's `contract.py`.

    Kernels compute in fp32, so float64 is left to the reference; requesting a kernel for it raises RuntimeError. What
    becomes of a fake tensor the reference says, whatever was requested.
    """
    if type(x) is FakeTensor:
        return reference_of(op, x)
    requested = _requested
    if x.dtype == torch.float64:
        if kernels_requested():
            raise RuntimeError(
                f"LIGER_KERNEL_IMPL={requested!r} computes in float32 and cannot serve float64; "
                f"convert the tensors with .to(), or use LIGER_KERNEL_IMPL=reference."
            )
        requested = REFERENCE
    return _kernels(op, x.device.type, requested)


for _file in pkgutil.iter_modules(__path__):
    if _file.name not in _SHARED:
        register(importlib.import_module(f"{__name__}.{_file.name}").BACKEND)
_requested: str | None = _from_environment()
__getattr__ = compat_names(__name__, NAMES, "liger_kernel.compat.dispatch")
