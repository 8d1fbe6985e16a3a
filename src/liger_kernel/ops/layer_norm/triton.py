"""LayerNorm by the kernels of `rms_norm`: forward moves 2 n elements, backward 3 n."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from liger_kernel.ops.rms_norm.triton import Config as Config
from liger_kernel.ops.rms_norm.triton import norm_backward, norm_forward


def forward(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, needs: Sequence[bool]
) -> tuple[Tensor, tuple[Tensor | None, ...]]:
    y, _, rows, mean, rstd = norm_forward(
        x, None, weight, bias, eps, 0.0, centered=True, rounded=False
    )
    return y, (rows, weight, bias, mean, rstd)


def backward(
    grads: Sequence[Tensor],
    saved: Sequence[Tensor],
    options: tuple[float],
    needs: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    rows, weight, bias, mean, rstd = saved
    wanted = (needs[0], needs[1], needs[2])
    return norm_backward(grads[0], None, rows, weight, bias, mean, rstd, 0.0, wanted, rounded=False)
