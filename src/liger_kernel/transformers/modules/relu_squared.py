"""The squared ReLU as an activation module."""

from __future__ import annotations

from torch import Tensor, nn

from liger_kernel.ops.relu_squared import LigerReLUSquaredFunction


class LigerReLUSquared(nn.Module):
    """`max(x, 0)^2`, elementwise, as in Nemotron."""

    def forward(self, x: Tensor) -> Tensor:
        return LigerReLUSquaredFunction.apply(x)
