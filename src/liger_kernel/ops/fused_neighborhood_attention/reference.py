"""Neighbourhood attention in plain PyTorch, with the scores of all pairs: the specification."""

from __future__ import annotations

import torch
from torch import Tensor


def fused_neighborhood_attention(
    query: Tensor, key: Tensor, value: Tensor, kernel_size: int, dilation: int, scale: float | None
) -> Tensor:
    """softmax(scale query @ key.T, where |i - j| <= (kernel_size // 2) dilation and dilation divides i - j) @ value.

    Each step is rounded to the dtype of query; `scale` None is 1 / sqrt(D).
    """
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    at = torch.arange(query.shape[-2], device=query.device)
    apart = at[:, None] - at
    visible = (apart.abs() <= kernel_size // 2 * dilation) & (apart % dilation == 0)
    scores = (query @ key.transpose(-1, -2)) * scale
    return torch.softmax(scores.masked_fill(~visible, float("-inf")), -1) @ value
