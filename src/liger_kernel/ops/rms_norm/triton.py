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
    o, rounded = options, options.casting_mode == "llama"
    y, _, rows, _, rstd = norm_forward(
        x, None, weight, None, o.eps, o.offset, centered=False, rounded=rounded
    )
    return y, (rows, weight, rstd)


def backward(
    grads: Sequence[Tensor],
    saved: Sequence[Tensor],
    *,
    options: RMSNormOptions,
    needs: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None]:
    rows, weight, rstd = saved
    wanted, rounded = (needs[0], needs[1], False), options.casting_mode == "llama"
    dx, dw, _ = norm_backward(
        grads[0], None, rows, weight, None, None, rstd, options.offset, wanted, rounded=rounded
    )
    return dx, dw
