"""Cross entropy as a module, in the place of `torch.nn.CrossEntropyLoss`."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

import liger_kernel.ops.cross_entropy as _ops
from liger_kernel._core.declared import LossModule, takes
from liger_kernel.transformers.functional import CrossEntropyOutput, _loss_or_output


@dataclass(frozen=True)
class CrossEntropyOptions:
    """weight: (V,), an attribute, no buffer. The others as in `liger_kernel.ops.cross_entropy`.
    in_place: save the memory of the gradient by overwriting the logits.

    Raises: ValueError for an option outside of its range."""

    weight: Tensor | None = None
    ignore_index: int = -100
    lse_square_scale: float = 0.0
    label_smoothing: float = 0.0
    reduction: str = "mean"
    softcap: float | None = None
    return_z_loss: bool = False
    return_token_accuracy: bool = False
    return_predicted_tokens: bool = False
    in_place: bool = False

    def __post_init__(self) -> None:
        _ops.check_loss_options(self.label_smoothing, self.reduction, self.softcap)
        _ops.check_in_place(self.in_place, self.reduction)


class LigerCrossEntropyLoss(LossModule):
    """In the place of `torch.nn.CrossEntropyLoss`: `liger_kernel.ops.cross_entropy` with its options."""

    @takes(CrossEntropyOptions)
    def __init__(self) -> None: ...

    def forward(self, _input: Tensor, target: Tensor) -> Tensor | CrossEntropyOutput:
        """_input (N, V), target (N,). Returns the loss, or a `CrossEntropyOutput` if more is asked for."""
        return _loss_or_output(_ops.cross_entropy(_input, target, **self.chosen()))
