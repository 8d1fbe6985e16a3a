"""RMSNorm whose output is scaled and shifted by a condition."""

from __future__ import annotations

from torch import Tensor

from liger_kernel.ops import modulated_rms_norm as op
from liger_kernel.ops.modulated_rms_norm import (
    LigerModulatedRMSNormFunction as LigerModulatedRMSNormFunction,
)
from liger_kernel.transformers.modules.rms_norm import LigerRMSNorm


class LigerModulatedRMSNorm(LigerRMSNorm):
    """`rms_norm(x) * (1 + scale) + shift`, see `liger_kernel.ops.modulated_rms_norm`.

    The arguments, and what they raise, are those of `LigerRMSNorm`; `in_place` has no effect.
    """

    def __init__(
        self,
        hidden_size: int | None,
        eps: float = 1e-6,
        offset: float = 0.0,
        casting_mode: str = "llama",
        init_fn: str = "ones",
        in_place: bool = True,
        elementwise_affine: bool = True,
    ):
        options = (eps, offset, casting_mode, init_fn, in_place)
        super().__init__(hidden_size, *options, elementwise_affine=elementwise_affine)

    def forward(  # type: ignore[override]
        self, hidden_states: Tensor, scale: Tensor, shift: Tensor | None = None
    ) -> Tensor:
        options = (self.variance_epsilon, self.offset, self.casting_mode)
        return op.modulated_rms_norm(hidden_states, self.weight, scale, shift, *options)
