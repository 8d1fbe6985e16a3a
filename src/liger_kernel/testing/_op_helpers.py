"""For those who test an implementation that they registered with `liger_kernel.backends.registry`."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from liger_kernel import backends
from liger_kernel.backends.capability import Capability
from liger_kernel.compat import dispatch
from liger_kernel.ops.layer_norm.reference import layer_norm
from liger_kernel.ops.rms_norm.reference import rms_norm
from liger_kernel.testing.cases import Make
from liger_kernel.testing.compare import assert_no_worse
from liger_kernel.utils import infer_device


def pytorch_reference_rms_norm(
    x: Tensor, weight: Tensor, eps: float, offset: float = 0.0, casting_mode: str = "llama"
) -> Tensor:
    return rms_norm(x, weight, eps=eps, offset=offset, casting_mode=casting_mode)


def pytorch_reference_layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    return layer_norm(x, weight, bias, eps=eps)


def requires_cuda(reason: str = "CUDA required") -> Any:
    """A mark for tests that are skipped without CUDA."""
    import pytest

    return pytest.mark.skipif(not Capability(requires_cuda=True).is_satisfied(), reason=reason)


def iter_test_shapes(shapes: Iterable[tuple[int, ...]]) -> Iterator[tuple[int, ...]]:
    """`shapes`, each once."""
    yield from dict.fromkeys(map(tuple, shapes))


def sum_based_dw_close(
    dw: Tensor, dw_ref: Tensor, rtol: float, atol: float = 1e-3
) -> tuple[bool, str]:
    """Whether two gradients, sums over many rows, are as close as their largest entry lets them be; and what was found.

    An entry may differ by `atol`, or by `rtol` of the largest of `dw_ref`.
    """
    if dw.shape != dw_ref.shape:
        return False, f"shapes {tuple(dw.shape)} and {tuple(dw_ref.shape)}"
    if not dw.numel():
        return True, "no entries"
    largest = dw_ref.double().abs().max().item()
    found, limit = (dw.double() - dw_ref.double()).abs().max().item(), atol + rtol * largest
    return found <= limit, f"largest difference {found:.3g}, limit {limit:.3g}"


def assert_op_correctness(
    op_name: str,
    backend: str,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    *,
    casting_mode: str = "llama",
    offset: float = 0.0,
    eps: float = 1e-6,
    seed: int = 0,
    device: torch.device | None = None,
    extra: dict[str, Any] | None = None,
    strict_grad: bool = False,
) -> None:
    """Outputs and gradients of `backend` for random rows are no worse than those of PyTorch, against float64.

    For ops whose tensors have the shape of the first (softmax, SwiGLU, ...), and norms, whose weights have that of a
    row. `extra`: other arguments of the op. `strict_grad`: an input without a gradient is an error.
    """
    make = Make(dtype, seed=seed, device=device or infer_device())
    args = [make.randn(*shape)]
    options = dict(extra or {})
    if "norm" in op_name:
        options.setdefault("eps", eps)
        args += [make.randn(shape[-1]) for _ in range(2 if op_name == "layer_norm" else 1)]
    if "rms_norm" in op_name:
        options |= {"offset": offset, "casting_mode": casting_mode}
    if op_name in ("fused_add_rms_norm", "geglu", "swiglu"):
        args.insert(1, make.randn(*shape))

    def run(impl: str, dtype: torch.dtype) -> list[Any]:
        leaves = [a.to(dtype, copy=True).requires_grad_() for a in args]
        found = dispatch.resolve_impl(op_name, impl, make.device).call(*leaves, **options)
        outputs = found if isinstance(found, tuple) else (found,)
        total = sum(
            (o.double() * torch.linspace(1, 2, o.numel(), device=o.device).view_as(o)).sum()
            for o in outputs
        )
        grads = torch.autograd.grad(total, leaves, allow_unused=True)
        if strict_grad and any(grad is None for grad in grads):
            raise AssertionError(f"{impl} of {op_name} gives no gradient to one of its inputs.")
        return [*(o.detach() for o in outputs), *grads]

    with contextlib.ExitStack() as stack:
        stack.enter_context(backends.use_implementation(None))
        ours, low = run(backend, dtype), run(backends.REFERENCE, dtype)
        high = run(backends.REFERENCE, torch.float64)
    for index, values in enumerate(zip(ours, high, low, strict=True)):
        if values[0] is not None:
            assert_no_worse(f"{op_name} by {backend}: {index}", *values)
