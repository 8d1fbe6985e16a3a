"""Softmax in plain PyTorch: the specification."""

import torch
from torch import Tensor


def softmax(x: Tensor, causal: bool = False) -> Tensor:
    """y = exp(x - max) / sum(exp(x - max)) over the last dimension, rounded once to the dtype of x.

    causal: over columns up to that of the row's number in (..., L, L), and 0 beyond.
    """
    later = later_columns(x) if causal else None
    y = torch.softmax(x if later is None else x.masked_fill(later, float("-inf")), -1)
    return y.contiguous() if later is None else y.masked_fill(later, 0)  # a transposed x is not


def later_columns(x: Tensor) -> Tensor:
    """(L, L), where the column is behind the row."""
    return torch.ones(x.shape[-2:], dtype=torch.bool, device=x.device).triu(1)
