"""Multi-token attention in plain PyTorch: the specification."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from liger_kernel.ops.softmax.reference import softmax
from liger_kernel.ops.sparsemax.reference import sparsemax


def multi_token_attention(
    scores: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Any,
    padding: Any,
    dilation: Any,
    groups: int,
    sparse: bool,
) -> Tensor:
    """tril(conv2d(softmax(scores of keys <= query), 0 for later ones)), each step rounded to the dtype of scores.

    The convolution is in the dtype of weight, which autocast may have made another.
    """
    weights = (sparsemax if sparse else softmax)(scores, causal=True).to(weight.dtype)
    return F.conv2d(weights, weight, bias, stride, padding, dilation, groups).tril_()
