"""The last linear layer and its cross entropy as a module."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

import liger_kernel.loss_head.fused_linear_cross_entropy as _ops
from liger_kernel._core.declared import LossModule, takes
from liger_kernel.ops.cross_entropy import check_loss_options
from liger_kernel.transformers.functional import CrossEntropyOutput, _loss_or_output


@dataclass(frozen=True)
class FusedLinearCrossEntropyOptions:
    """ce_weight: (V,), an attribute, no buffer. The others as in `liger_kernel.ops.fused_linear_cross_entropy`.

    Raises: ValueError for an option outside of its range."""

    ce_weight: Tensor | None = None
    ignore_index: int = -100
    lse_square_scale: float = 0.0
    label_smoothing: float = 0.0
    reduction: str = "mean"
    softcap: float | None = None
    return_z_loss: bool = False
    accum_dtype: torch.dtype | None = None
    use_token_scaling: bool = False
    return_token_accuracy: bool = False
    return_predicted_tokens: bool = False

    def __post_init__(self) -> None:
        check_loss_options(self.label_smoothing, self.reduction, self.softcap)


class LigerFusedLinearCrossEntropyLoss(LossModule):
    """Head and loss in one, without the logits: `liger_kernel.ops.fused_linear_cross_entropy` with its options."""

    @takes(FusedLinearCrossEntropyOptions)
    def __init__(self) -> None: ...

    def forward(
        self, lin_weight: Tensor, _input: Tensor, target: Tensor, bias: Tensor | None = None
    ) -> Tensor | CrossEntropyOutput:
        """lin_weight (V, H), _input (N, H), target (N,), bias (V,). Returns as `LigerCrossEntropyLoss`."""
        options = self.chosen()
        options["class_weight"] = options.pop("ce_weight")
        outputs = _ops.fused_linear_cross_entropy(_input, lin_weight, target, bias, **options)
        return _loss_or_output(outputs)
