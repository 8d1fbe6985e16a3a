"""PolyNorm, an activation of three normalised powers."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from liger_kernel.ops import poly_norm as op
from liger_kernel.ops.poly_norm import LigerPolyNormFunction as LigerPolyNormFunction


class LigerPolyNorm(nn.Module):
    """`w0 n(x^3) + w1 n(x^2) + w2 n(x) + b` over the last dimension, see `liger_kernel.ops.poly_norm`.

    The weight (3,) starts with thirds, the bias, of shape (), with 1. `in_place` has no effect.
    """

    def __init__(self, eps: float = 1e-6, in_place: bool = True):
        super().__init__()
        self.weight = nn.Parameter(torch.full((3,), 1 / 3))
        self.bias = nn.Parameter(torch.tensor(1.0))
        self.variance_epsilon = eps
        self.in_place = in_place

    def forward(self, hidden_states: Tensor) -> Tensor:
        return op.poly_norm(hidden_states, self.weight, self.bias, self.variance_epsilon)

    def extra_repr(self) -> str:
        return f"{tuple(self.weight.shape)}, eps={self.variance_epsilon}, in_place={self.in_place}"
