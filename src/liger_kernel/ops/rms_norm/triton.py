"""RMSNorm by the kernels of `norms`: forward moves 2 n elements, backward 3 n."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from liger_kernel._core.contract import Saved
from liger_kernel.ops.norms.kernels import norm_backward, norm_forward
from liger_kernel.ops.rms_norm.contract import RMSNormOptions


def forward(
    x: Tensor, weight: Tensor | None, *, options: RMSNormOptions, needs: Sequence[bool]
) -> tuple[Tensor, Saved]:
    y, _, rows, _, rstd = norm_forward(x, options, weight)
    return y, (rows, weight, rstd)


def backward(
    grads: Sequence[Tensor],
    saved: Sequence[Tensor],
    *,
    options: RMSNormOptions,
    needs: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None]:
    rows, weight, rstd = saved
    dx, dw, _ = norm_backward(grads[0], rows, options, needs, weight, rstd)
    return dx, dw
