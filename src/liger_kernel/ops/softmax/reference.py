"""Softmax in plain PyTorch: the specification."""

import torch
from torch import Tensor


def softmax(x: Tensor) -> Tensor:
    """y = exp(x - max) / sum(exp(x - max)) over the last dimension, rounded once to the dtype of x."""
    return torch.softmax(x, -1).contiguous()  # which a transposed x is not
