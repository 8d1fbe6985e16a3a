"""Softmax over the last dimension, as a module."""

from __future__ import annotations

from torch import Tensor, nn

from liger_kernel.ops import softmax as op
from liger_kernel.ops.softmax import LigerSoftmaxFunction as LigerSoftmaxFunction


class LigerSoftmax(nn.Module):
    """`exp(x - max) / sum(exp(x - max))` over the last dimension, see `liger_kernel.ops.softmax`."""

    def forward(self, x: Tensor) -> Tensor:
        return op.softmax(x)
