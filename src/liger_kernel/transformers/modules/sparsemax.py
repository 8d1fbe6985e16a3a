"""Sparsemax as a module."""

from __future__ import annotations

from torch import Tensor, nn

from liger_kernel.ops import sparsemax as op
from liger_kernel.ops.sparsemax import LigerSparsemaxFunction as LigerSparsemaxFunction


class LigerSparsemax(nn.Module):
    """`max(x - tau, 0)` with the tau that makes it sum to 1 along `dim`, see `liger_kernel.ops.sparsemax`."""

    def __init__(self, dim: int = -1):
        super().__init__()
        self.dim = dim

    def forward(self, x: Tensor) -> Tensor:
        return op.sparsemax(x, self.dim)

    def extra_repr(self) -> str:
        return f"dim={self.dim}"
