"""What computes cross entropy has to offer: one step over rows of logits; and the options that reach it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from liger_kernel._core.options import OpOptions
from liger_kernel._core.rows import RowOutputs

Outputs = tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]


@dataclass(frozen=True)
class CrossEntropyOptions(OpOptions):
    """As `cross_entropy` takes them; `token_scaling` weighs a row by its detached probability of the label."""

    ignore_index: int = -100
    lse_square_scale: float = 0.0
    label_smoothing: float = 0.0
    reduction: str = "mean"
    softcap: float | None = None
    return_z_loss: bool = False
    return_token_accuracy: bool = False
    return_predicted_tokens: bool = False
    token_scaling: bool = False


@dataclass(frozen=True)
class Totals:
    """Sums over *all* rows, 0-d tensors on the device: nothing here waits for it. None where no formula reads it."""

    count: Tensor | None  # labels that are not ignored
    weight: Tensor | None  # class weights at those labels
    weight_all: Tensor | None  # class weights of every class

    @staticmethod
    def of(target: Tensor, weight: Tensor | None, options: CrossEntropyOptions) -> Totals:
        mean = options.reduction == "mean"
        count = None
        if mean or options.return_token_accuracy:
            count = (target != options.ignore_index).sum()
        at_labels, of_all = None, None
        if weight is not None and mean:
            used = weight.to(torch.promote_types(weight.dtype, torch.float32))
            used = used[target.clamp(0, weight.shape[0] - 1)]
            at_labels = used.masked_fill(target == options.ignore_index, 0).sum()
        if weight is not None and options.label_smoothing:
            of_all = weight.sum(dtype=torch.promote_types(weight.dtype, torch.float32))
        return Totals(count, at_labels, of_all)

    def divisor(self, options: CrossEntropyOptions) -> Tensor | None:
        """Of the loss of a row; None where nothing divides it."""
        if options.reduction != "mean":
            return None
        return self.count if self.weight is None else self.weight


class CrossEntropyRows(RowOutputs):
    """Loss, z-loss (part of the loss, too), fp32 accuracy (1 where the prediction is the label), int64 prediction."""

    ignored = (0, 0, 0, -1)

    @staticmethod
    def empty(target: Tensor, dtype: torch.dtype, options: CrossEntropyOptions) -> CrossEntropyRows:
        def new(wanted: bool, dtype: torch.dtype) -> Tensor | None:
            return torch.empty(target.shape, dtype=dtype, device=target.device) if wanted else None

        return CrossEntropyRows(
            new(True, dtype),
            new(options.return_z_loss, dtype),
            new(options.return_token_accuracy, torch.float32),
            new(options.return_predicted_tokens, torch.int64),
        )

    def reduced(self, options: CrossEntropyOptions, totals: Totals) -> Outputs:
        loss, (_, z_loss, accuracy, predicted) = self.loss, self.columns
        if options.reduction == "none":
            return loss, z_loss, accuracy, predicted
        if accuracy is not None and totals.count is not None:
            accuracy = accuracy.sum() / totals.count.clamp(min=1)
        return loss.sum(), None if z_loss is None else z_loss.sum(), accuracy, predicted


class Kernels(Protocol):
    def step(
        self,
        logits: Tensor,
        target: Tensor,
        weight: Tensor | None,
        *,
        totals: Totals,
        options: CrossEntropyOptions,
        out: CrossEntropyRows,
        grad: Tensor | None,
        row_scale: Tensor | None,
        padded: bool,
    ) -> None:
        """Write the loss terms of (N, V) logits to `out`, and the gradient of sum(loss * row_scale) to `grad`.

        `grad` may be the logits themselves. `padded`: rows start at multiples of 16 elements, and what is between them
        is free. With p the softmax, the gradient of a row's loss (formula: `reference.terms`) is
        `slope p - smooth w_v - hit [v = y]`, times 1 - tanh^2 under a soft-cap.
        """

    def statistics(
        self,
        logits: Tensor,
        target: Tensor,
        *,
        first: int,
        options: CrossEntropyOptions,
        out: Tensor,
        padded: bool,
    ) -> None:
        """Write to `out` (5, N) what one needs of `logits` (N, classes from `first` on) for the loss over all classes.

        Of each row, at least fp32 and after the soft-cap: the largest logit, the sum of exp(x - that), the logit of the
        label (0 where it is no class here), the sum of the logits, and the first class of the largest logit. The last
        two are unspecified where no option reads them, and so is a row whose label is ignored.
        """

    def gradient(
        self,
        logits: Tensor,
        target: Tensor,
        factors: Tensor,
        *,
        first: int,
        options: CrossEntropyOptions,
        grad: Tensor,
        padded: bool,
    ) -> None:
        """Write slope exp(x - top) - share - hit [v = y] to `grad`, times 1 - tanh^2 under a soft-cap.

        factors: (4, N) top, slope, hit and share of each row. `grad` may be the logits themselves. Other arguments as
        in `statistics`; the gradient of a row whose label is ignored is 0.
        """
