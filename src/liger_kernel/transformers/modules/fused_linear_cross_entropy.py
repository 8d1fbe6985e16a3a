"""The last linear layer and its cross entropy as a module."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

import liger_kernel.ops.fused_linear_cross_entropy as _ops
from liger_kernel.transformers.modules.cross_entropy import LossModule

if TYPE_CHECKING:
    from liger_kernel.transformers.functional import CrossEntropyOutput


class LigerFusedLinearCrossEntropyLoss(LossModule):
    """`liger_kernel.ops.fused_linear_cross_entropy` with its options; `ce_weight` (V,) is no buffer."""

    def __init__(
        self,
        ce_weight: Tensor | None = None,
        ignore_index: int = -100,
        lse_square_scale: float = 0.0,
        label_smoothing: float = 0.0,
        reduction: str = "mean",
        softcap: float | None = None,
        return_z_loss: bool = False,
        accum_dtype: torch.dtype | None = None,
        use_token_scaling: bool = False,
        return_token_accuracy: bool = False,
        return_predicted_tokens: bool = False,
    ):
        super().__init__(
            ignore_index,
            lse_square_scale,
            label_smoothing,
            reduction,
            softcap,
            return_z_loss,
            return_token_accuracy,
            return_predicted_tokens,
        )
        self.ce_weight = ce_weight
        self.accum_dtype = accum_dtype
        self.use_token_scaling = use_token_scaling

    def options(self) -> dict[str, Any]:
        return {
            **super().options(),
            "accum_dtype": self.accum_dtype,
            "use_token_scaling": self.use_token_scaling,
        }

    def forward(
        self, lin_weight: Tensor, _input: Tensor, target: Tensor, bias: Tensor | None = None
    ) -> Tensor | CrossEntropyOutput:
        """lin_weight (V, H), _input (N, H), target (N,), bias (V,). Returns as `LigerCrossEntropyLoss`."""
        outputs = _ops.fused_linear_cross_entropy(
            _input, lin_weight, target, bias, self.ce_weight, **self.options()
        )
        return self.output(outputs)
