"""GroupNorm as a module."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from liger_kernel.ops import group_norm as op
from liger_kernel.ops.group_norm import LigerGroupNormFunction as LigerGroupNormFunction
from liger_kernel.transformers.modules.rms_norm import initial_weight


class LigerGroupNorm(nn.Module):
    """GroupNorm of (B, C, ...), see `liger_kernel.ops.group_norm`.

    Args:
        num_channels: C. num_groups: a divisor of it.
        eps: added to the variance; 1e-6 by default where torch has 1e-5.
        bias: True for a bias that starts at zero, False for none.
        init_fn: what the weight starts with, "ones" or "zeros".

    Raises: ValueError for groups that do not divide the channels, an unknown `init_fn`, or other channels than C.
    """

    def __init__(
        self,
        num_channels: int,
        num_groups: int,
        eps: float = 1e-6,
        bias: bool = False,
        init_fn: str = "ones",
    ):
        super().__init__()
        op.check_groups(torch.empty(1, num_channels, device="meta"), None, None, num_groups)
        self.num_channels = num_channels
        self.num_groups = num_groups
        self.variance_epsilon = eps
        self.weight = initial_weight(num_channels, init_fn)
        self.bias = initial_weight(num_channels, "zeros") if bias else None

    def forward(self, hidden_states: Tensor) -> Tensor:
        op.check_channels(hidden_states, self.num_channels)
        return op.group_norm(
            hidden_states, self.weight, self.bias, self.num_groups, self.variance_epsilon
        )

    def extra_repr(self) -> str:
        return f"{self.num_channels}, num_groups={self.num_groups}, eps={self.variance_epsilon}"
