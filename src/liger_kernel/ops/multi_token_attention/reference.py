"""Multi-token attention in plain PyTorch: the specification."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
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
    probabilities: Callable[..., Tensor] | None = None,
    convolution: Callable[..., Tensor] = F.conv2d,
) -> Tensor:
    """tril(conv2d(softmax(scores where key <= query, else -inf))), each step rounded to the dtype of scores.

    `probabilities` and `convolution` are what computes the two steps.
    """
    length = scores.shape[-1]
    later = torch.ones(length, length, dtype=torch.bool, device=scores.device).triu(1)
    masked = scores.masked_fill(later, float("-inf"))
    weights = (probabilities or (sparsemax if sparse else softmax))(masked)
    found = convolution(weights, weight, bias, stride, padding, dilation, groups)
    if found.shape[-2] != found.shape[-1]:
        raise ValueError(
            f"The convolution makes {tuple(found.shape)} of scores {tuple(scores.shape)}, but the last two dimensions "
            f"have to be equal for the causal mask; choose stride and padding to fit the kernel."
        )
    return found.tril_()
