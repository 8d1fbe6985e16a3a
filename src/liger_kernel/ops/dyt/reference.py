"""Dynamic tanh in plain PyTorch: the specification."""

import torch
from torch import Tensor


def dyt(x: Tensor, alpha: Tensor, gamma: Tensor, beta: Tensor | None) -> Tensor:
    """y = tanh(alpha x) gamma + beta, in fp32 (float64 for float64 input), rounded once to the dtype of x."""
    compute = torch.promote_types(x.dtype, torch.float32)
    y = torch.tanh(alpha.to(compute) * x.to(compute)) * gamma.to(compute)
    if beta is not None:
        y = y + beta.to(compute)
    return y.to(x.dtype).contiguous()
