"""Squared ReLU in plain PyTorch: the specification."""

import torch
from torch import Tensor


def relu_squared(x: Tensor) -> Tensor:
    """y = max(x, 0)^2, rounded once to the dtype of x."""
    return torch.relu(x).square()
