"""Add + RMSNorm by the kernels of `norms`: forward moves 4 n elements (x, residual, y, s), backward 4 n."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from liger_kernel._core.contract import Saved
from liger_kernel._core.shapes import as_rows
from liger_kernel.ops.fused_add_rms_norm.contract import FusedAddRMSNormOptions
from liger_kernel.ops.norms.kernels import norm_backward, norm_forward


def forward(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None,
    *,
    options: FusedAddRMSNormOptions,
    needs: Sequence[bool],
) -> tuple[tuple[Tensor, Tensor | None], Saved]:
    o, rounded = options, options.casting_mode == "llama"
    y, s, _, _, rstd = norm_forward(
        x, residual, weight, None, o.eps, o.offset, centered=False, rounded=rounded
    )
    # s itself and no view of it: autograd knows an output, while a view of it would keep its own graph alive
    return (y, s), (s, weight, rstd)


def backward(
    grads: Sequence[Tensor | None],
    saved: Sequence[Tensor],
    *,
    options: FusedAddRMSNormOptions,
    needs: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    s, weight, rstd = saved
    dy, ds = grads
    needs_dx = needs[0] or needs[1]
    if dy is None:
        dx, dw = ds, None
    else:
        dx, dw, _ = norm_backward(
            dy,
            ds,
            as_rows(s),
            weight,
            None,
            None,
            rstd,
            options.offset,
            (needs_dx, needs[2], False),
            rounded=options.casting_mode == "llama",
        )
    return dx if needs[0] else None, dx if needs[1] else None, dw
