"""Multi-token attention (Golovneva et al. 2025, https://arxiv.org/abs/2504.00927): causal attention weights, mixed over
neighbouring queries, keys and heads by a convolution."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from liger_kernel._core.autograd import autocast_dtype, is_transformed, refuse_double_backward
from liger_kernel._core.checks import check_floating, check_same_device
from liger_kernel._core.lazy import compat_names
from liger_kernel.ops import OPS
from liger_kernel.ops.multi_token_attention import reference
from liger_kernel.ops.softmax import softmax
from liger_kernel.ops.sparsemax import sparsemax

Pair = int | tuple[int, int]


def multi_token_attention(
    scores: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Pair = 1,
    padding: Pair = 0,
    dilation: Pair = 1,
    groups: int = 1,
    sparse: bool = False,
) -> Tensor:
    """`conv2d(softmax(causal scores))`, with zeros above the diagonal.

    Args:
        scores: (B, C, L, L), queries by keys; any floating dtype, any strides.
        weight: (O, C / groups, kH, kW), bias (O,) or None, stride, padding, dilation and groups: as in
            `torch.nn.functional.conv2d`.
        sparse: sparsemax in place of the softmax.

    Returns: (B, O, L', L') in the dtype of scores. A key after the query weighs 0 before the convolution, and 0 in what
        is returned.
    Raises: ValueError for scores that are not square, or that the convolution makes so; TypeError for integers.
    """
    check_floating(scores=scores, weight=weight, bias=bias)
    check_same_device(scores=scores, weight=weight, bias=bias)
    if scores.ndim != 4 or scores.shape[-2] != scores.shape[-1]:
        raise ValueError(f"scores has shape {tuple(scores.shape)}; pass (B, C, L, L).")
    probabilities = sparsemax if sparse else softmax
    geometry = (stride, padding, dilation, groups)
    return reference.multi_token_attention(
        scores, weight, bias, *geometry, sparse, probabilities, _convolution
    )


def _convolution(x: Tensor, weight: Tensor, bias: Tensor | None, *geometry: Any) -> Tensor:
    if is_transformed():
        return F.conv2d(x, weight, bias, *geometry)
    dtype = autocast_dtype(x)
    if dtype is not None:
        x, weight, bias = x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    found: Tensor = _Convolution.apply(x, weight, bias, *geometry)
    return found


class _Convolution(torch.autograd.Function):
    """`conv2d` with gradients that are the same in every run: cuDNN would add up those of the weight in any order."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, *geometry: Any) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.geometry = geometry
        return F.conv2d(x, weight, bias, *geometry)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        refuse_double_backward()
        x, weight = ctx.saved_tensors
        *sizes, groups = ctx.geometry
        pairs = [[n, n] if isinstance(n, int) else [*n] for n in sizes]
        cudnn: Any = torch.backends.cudnn
        before, cudnn.deterministic = cudnn.deterministic, True
        try:
            found = torch.ops.aten.convolution_backward(
                *(grads[0], x, weight, [weight.shape[0]], *pairs),
                *(False, [0, 0], groups, ctx.needs_input_grad[:3]),
            )
        finally:
            cudnn.deterministic = before
        return *found, None, None, None, None


__getattr__ = compat_names(__name__, OPS["multi_token_attention"])
