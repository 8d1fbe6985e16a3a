"""Residual addition and RMSNorm in one module."""

from __future__ import annotations

from torch import Tensor, nn

from liger_kernel._core.checks import check_choice
from liger_kernel.ops import fused_add_rms_norm as op
from liger_kernel.ops.fused_add_rms_norm import (
    LigerFusedAddRMSNormFunction as LigerFusedAddRMSNormFunction,
)
from liger_kernel.ops.rms_norm import CASTING_MODES
from liger_kernel.transformers.modules.rms_norm import initial_weight


class LigerFusedAddRMSNorm(nn.Module):
    """`(rms_norm(s), s)` with `s = hidden_states + residual`, see `liger_kernel.ops.fused_add_rms_norm`.

    The arguments are those of `LigerRMSNorm`; `in_place` has no effect. ValueError for an unknown `init_fn` or casting
    mode.
    """

    def __init__(
        self,
        hidden_size: int,
        eps: float = 1e-6,
        offset: float = 0.0,
        casting_mode: str = "llama",
        init_fn: str = "ones",
        in_place: bool = False,
    ):
        super().__init__()
        check_choice("casting_mode", casting_mode, CASTING_MODES)
        self.weight = initial_weight(hidden_size, init_fn)
        self.variance_epsilon = eps
        self.offset = offset
        self.casting_mode = casting_mode
        self.in_place = in_place

    def forward(self, hidden_states: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        options = (self.variance_epsilon, self.offset, self.casting_mode)
        return op.fused_add_rms_norm(hidden_states, residual, self.weight, *options)

    def extra_repr(self) -> str:
        return (
            f"{tuple(self.weight.shape)}, eps={self.variance_epsilon}, offset={self.offset}, "
            f"in_place={self.in_place}"
        )
