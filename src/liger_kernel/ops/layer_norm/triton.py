"""LayerNorm by the kernels of `norms`: forward moves 2 n elements, backward 3 n."""

from __future__ import annotations

from torch import Tensor

from liger_kernel._core.contract import Grads, Needs, Saved
from liger_kernel.ops.layer_norm.contract import LayerNormOptions
from liger_kernel.ops.norms.kernels import norm_backward, norm_forward


def forward(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    *,
    options: LayerNormOptions,
    needs: Needs,
) -> tuple[Tensor, Saved]:
    y, _, rows, mean, rstd = norm_forward(x, options, weight, bias, centered=True)
    return y, (rows, weight, bias, mean, rstd)


def backward(grads: Grads, saved: Saved, *, options: LayerNormOptions, needs: Needs) -> Grads:
    rows, weight, bias, mean, rstd = saved
    return norm_backward(grads[0], rows, options, needs, weight, rstd, bias, mean)
