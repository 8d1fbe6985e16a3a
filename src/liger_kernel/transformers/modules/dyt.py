"""Dynamic tanh, a layer that stands in for a norm."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from liger_kernel.ops import dyt as op
from liger_kernel.ops.dyt import LigerDyTFunction as LigerDyTFunction


class LigerDyT(nn.Module):
    """`tanh(alpha * x) * gamma + beta`, see `liger_kernel.ops.dyt`.

    Args:
        hidden_size: N, the length of gamma, which starts with ones, and of beta, which starts with zeros.
        beta: False for none.
        init_alpha: what alpha, of shape (1,), starts with.
    """

    def __init__(self, hidden_size: int, beta: bool = True, init_alpha: float = 0.5):
        super().__init__()
        self.hidden_size = hidden_size
        self.init_alpha = init_alpha
        self.alpha = nn.Parameter(torch.full((1,), float(init_alpha)))
        self.gamma = nn.Parameter(torch.ones(hidden_size))
        self.beta = nn.Parameter(torch.zeros(hidden_size)) if beta else None

    def forward(self, x: Tensor) -> Tensor:
        return op.dyt(x, self.alpha, self.gamma, self.beta)

    def extra_repr(self) -> str:
        return f"{self.hidden_size}, beta={self.beta is not None}, init_alpha={self.init_alpha}"
