"""Add + RMSNorm by the kernels of `norms`: forward moves 4 n elements (x, residual, y, s), backward 4 n."""

from __future__ import annotations

from torch import Tensor

from liger_kernel._core.contract import Grads, Needs, Saved
from liger_kernel._core.shapes import as_rows
from liger_kernel.ops.fused_add_rms_norm.contract import FusedAddRMSNormOptions
from liger_kernel.ops.norms.kernels import norm_backward, norm_forward
from liger_kernel.ops.rms_norm import triton as of_norm


def forward(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    *,
    options: FusedAddRMSNormOptions,
    needs: Needs,
) -> tuple[tuple[Tensor, Tensor | None], Saved]:
    y, s, _, _, rstd = norm_forward(x, options, weight, residual=residual)
    if s is None:
        s = x.detach()  # an output of its own, over the same memory
    # s itself and no view of it: autograd knows an output, while a view of it would keep its own graph alive
    return (y, s), (s, weight, rstd)


def factors(saved: Saved, options: FusedAddRMSNormOptions) -> tuple[Tensor, Tensor, Tensor | None]:
    s, *others = saved
    assert s is not None
    return of_norm.factors((as_rows(s), *others), options)


def backward(grads: Grads, saved: Saved, *, options: FusedAddRMSNormOptions, needs: Needs) -> Grads:
    s, weight, rstd = saved
    dy, ds = grads
    dx, dw = ds, None
    if dy is not None:
        wanted = (needs[0] or needs[1], needs[2])
        dx, dw, _ = norm_backward(dy, as_rows(s), options, wanted, weight, rstd, grad_sum=ds)
    return dx if needs[0] else None, dx if needs[1] else None, dw
