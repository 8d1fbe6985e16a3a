"""Cross entropy as a module, in the place of `torch.nn.CrossEntropyLoss`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

import liger_kernel.ops.cross_entropy as _ops

if TYPE_CHECKING:
    from liger_kernel.transformers.functional import CrossEntropyOutput


class LossModule(torch.nn.Module):
    """The options that all cross entropy modules have in common; ValueError for a value outside its range."""

    def __init__(
        self,
        ignore_index: int,
        lse_square_scale: float,
        label_smoothing: float,
        reduction: str,
        softcap: float | None,
        return_z_loss: bool,
        return_token_accuracy: bool,
        return_predicted_tokens: bool,
    ):
        super().__init__()
        _ops.check_loss_options(label_smoothing, reduction, softcap)
        self.ignore_index = ignore_index
        self.lse_square_scale = lse_square_scale
        self.label_smoothing = label_smoothing
        self.reduction = reduction
        self.softcap = softcap
        self.return_z_loss = return_z_loss
        self.return_token_accuracy = return_token_accuracy
        self.return_predicted_tokens = return_predicted_tokens

    def options(self) -> dict[str, Any]:
        """As the ops take them; read at every call, so that a changed attribute takes effect."""
        return {
            "ignore_index": self.ignore_index,
            "lse_square_scale": self.lse_square_scale,
            "label_smoothing": self.label_smoothing,
            "reduction": self.reduction,
            "softcap": self.softcap,
            "return_z_loss": self.return_z_loss,
            "return_token_accuracy": self.return_token_accuracy,
            "return_predicted_tokens": self.return_predicted_tokens,
        }

    def output(self, outputs: _ops.Outputs) -> Tensor | CrossEntropyOutput:
        """The loss alone, unless one of the `return_*` flags is set."""
        if self.return_z_loss or self.return_token_accuracy or self.return_predicted_tokens:
            from liger_kernel.transformers.functional import CrossEntropyOutput

            return CrossEntropyOutput(*outputs)
        return outputs[0]

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.options().items())


class LigerCrossEntropyLoss(LossModule):
    """`liger_kernel.ops.cross_entropy` with its options; `weight` (V,) is an attribute, not a buffer.

    `in_place=True` saves the memory of the gradient by overwriting the logits.
    """

    def __init__(
        self,
        weight: Tensor | None = None,
        ignore_index: int = -100,
        lse_square_scale: float = 0.0,
        label_smoothing: float = 0.0,
        reduction: str = "mean",
        softcap: float | None = None,
        return_z_loss: bool = False,
        return_token_accuracy: bool = False,
        return_predicted_tokens: bool = False,
        in_place: bool = False,
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
        _ops.check_in_place(in_place, reduction)
        self.weight = weight
        self.in_place = in_place

    def options(self) -> dict[str, Any]:
        return {**super().options(), "in_place": self.in_place}

    def forward(self, _input: Tensor, target: Tensor) -> Tensor | CrossEntropyOutput:
        """_input (N, V), target (N,). Returns the loss, or a `CrossEntropyOutput` if a `return_*` flag is set."""
        return self.output(_ops.cross_entropy(_input, target, self.weight, **self.options()))
