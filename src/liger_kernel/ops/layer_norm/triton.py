"""LayerNorm by the kernels of `norms`: forward moves 2 n elements, backward 3 n."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from liger_kernel._core.contract import Saved
from liger_kernel.ops.layer_norm.contract import LayerNormOptions
from liger_kernel.ops.norms.kernels import norm_backward, norm_forward


def forward(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    *,
    options: LayerNormOptions,
    needs: Sequence[bool],
) -> tuple[Tensor, Saved]:
    y, _, rows, mean, rstd = norm_forward(x, options, weight, bias, centered=True)
    return y, (rows, weight, bias, mean, rstd)


def backward(
    grads: Sequence[Tensor],
    saved: Sequence[Tensor],
    *,
    options: LayerNormOptions,
    needs: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    rows, weight, bias, mean, rstd = saved
    return norm_backward(grads[0], rows, options, needs, weight, rstd, bias, mean)
