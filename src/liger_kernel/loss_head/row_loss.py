"""The contract of a loss over a vocabulary. It knows labels and logits, and nothing of chunks or matrix products."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from liger_kernel._core.checks import check_choice
from liger_kernel._core.options import OpOptions
from liger_kernel._core.rows import RowOutputs
from liger_kernel.ops.cross_entropy.portable import row_blocks

#: at most so many tensors are returned by a loss: the library op has a fixed number of outputs
MOST_OUTPUTS = 4


class RowLoss(OpOptions, ABC):
    """A frozen dataclass of options (bool, int, float, str, or None) with these methods.

    name: its row in `losses.ROW_LOSSES`. reads_teacher: a second slab, of a teacher's logits, comes with each chunk.
    weighs_rows: `class_weight` holds a number for each row, (N,), instead of one for each class.

    A row may have one loss or K differentiable numbers: the first output is (N,) or, with reduction "none", (N, K), and
    so is what autograd sends back for it, the row_scale of `step`.
    """

    name: ClassVar[str] = ""
    reads_teacher: ClassVar[bool] = False
    weighs_rows: ClassVar[bool] = False

    ignore_index: int
    reduction: str

    @property
    def recomputes(self) -> bool:
        """Whether gradients wait for that of each row, so that backward runs the loop again."""
        return self.reduction == "none"

    def whole_vocabulary(self, n_here: int) -> int:
        """How many classes a label may name, where the head here has `n_here`: more if other ranks have the others."""
        return n_here

    def agreed(self, weight: Tensor) -> Tensor:
        """The weight by whose shape rows are cut into chunks: the same on all ranks that meet in each chunk."""
        return weight

    @abstractmethod
    def prepare(self, target: Tensor, class_weight: Tensor | None) -> Any:
        """What the formula needs to know of *all* labels (N,), without waiting for the device."""

    def of_rows(self, prepared: Any, rows: slice | Tensor) -> Any:
        """What `step` is given of `prepared` for these rows."""
        return prepared

    @abstractmethod
    def divisor(self, prepared: Any) -> Tensor | None:
        """0-d: what the sum of a mean is divided by; None where there is none."""

    @abstractmethod
    def outputs(self, target: Tensor, dtype: torch.dtype) -> RowOutputs:
        """Uninitialised memory for what `step` says of the rows of `target`; floats in `dtype`."""

    @abstractmethod
    def step(
        self,
        logits: Tensor,
        teacher: Tensor | None,
        target: Tensor,
        prepared: Any,
        *,
        out: RowOutputs,
        grad: Tensor | None = None,
        row_scale: Tensor | None = None,
        padded: bool = False,
    ) -> None:
        """Write what is said of some rows to `out`, and the gradient of sum(loss * row_scale) to `grad`.

        logits: (C, V) in the dtype of the products; `grad` is the same memory, or None. teacher: (C, Vt) or None.
        target: (C,). row_scale: fp32 in the shape of the loss, or None for ones. A row that is ignored has loss and
        gradient 0.
        padded: rows start at whole vectors; what lies between them is 0, and has to be 0 afterwards.
        """

    @abstractmethod
    def reduced(self, out: RowOutputs, prepared: Any) -> tuple[Tensor | None, ...]:
        """What the caller gets: the loss first, at most `MOST_OUTPUTS`. Only the first carries gradients."""

    def of_logits(
        self, logits: Tensor, teacher: Tensor | None, target: Tensor, class_weight: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        """What `reduced` says of all logits (N, V), at least fp32, in PyTorch's own ops: for who follows them."""
        raise NotImplementedError(
            f"{type(self).__name__} has no formula in PyTorch's own ops, which torch.func, forward-mode AD and "
            f"torch.jit.trace follow; define its of_logits, or call it outside of them."
        )

    @abstractmethod
    def output_likes(self, target: Tensor, dtype: torch.dtype) -> list[tuple[Any, torch.dtype]]:
        """(shape, dtype) of each tensor of `reduced`, None for the shape of one that is None."""


@dataclass(frozen=True)
class FormulaLoss(RowLoss):
    """A row loss that is a differentiable formula: a subclass defines `formula` and, if it has one, options."""

    ignore_index: int = -100
    reduction: str = "mean"
    #: values that the formula reports besides the loss
    n_reported: ClassVar[int] = 0

    def __post_init__(self) -> None:
        check_choice("reduction", self.reduction, ("mean", "sum", "none"))

    @abstractmethod
    def formula(self, logits: Tensor, teacher: Tensor | None, target: Tensor) -> tuple[Tensor, ...]:
        """The loss of each row (C,), and `n_reported` other numbers of each row; logits (C, V) at least fp32.

        Rows to be ignored may come out as anything, and their labels may be no class.
        """

    def prepare(self, target: Tensor, class_weight: Tensor | None) -> Tensor:
        if class_weight is not None:
            raise ValueError(f"{type(self).__name__} has no class weights; pass class_weight=None.")
        return (target != self.ignore_index).sum().clamp(min=1)

    def divisor(self, prepared: Tensor) -> Tensor | None:
        return prepared if self.reduction == "mean" else None

    def outputs(self, target: Tensor, dtype: torch.dtype) -> RowOutputs:
        columns = range(1 + self.n_reported)
        return RowOutputs(
            *(torch.empty(target.shape, dtype=dtype, device=target.device) for _ in columns)
        )

    def step(
        self,
        logits: Tensor,
        teacher: Tensor | None,
        target: Tensor,
        prepared: Tensor,
        *,
        out: RowOutputs,
        grad: Tensor | None = None,
        row_scale: Tensor | None = None,
        padded: bool = False,
    ) -> None:
        divisor = self.divisor(prepared)
        for at in row_blocks(logits):
            of_rows = (None if t is None else t[at] for t in (grad, row_scale))
            part = None if teacher is None else teacher[at]
            self._step(logits[at], part, target[at], divisor, out[at], *of_rows)

    def _step(
        self,
        logits: Tensor,
        teacher: Tensor | None,
        target: Tensor,
        divisor: Tensor | None,
        out: RowOutputs,
        grad: Tensor | None,
        row_scale: Tensor | None,
    ) -> None:
        wide = torch.promote_types(logits.dtype, torch.float32)
        ignored = target == self.ignore_index
        with torch.enable_grad():
            leaf = logits.detach().to(wide).requires_grad_(grad is not None)
            found = self.formula(leaf, None if teacher is None else teacher.to(wide), target)
        for column, values in zip(out.columns, found, strict=True):
            assert column is not None
            values = values.detach().masked_fill(ignored, 0)
            column.copy_(values if divisor is None else values / divisor)
        if grad is not None:
            scale = torch.ones_like(out.loss) if row_scale is None else row_scale
            scale = scale if divisor is None else scale / divisor
            cotangent = scale.to(wide).masked_fill(ignored, 0)
            (g,) = torch.autograd.grad(found[0], leaf, cotangent)
            grad.copy_(g.masked_fill_(ignored[:, None], 0))

    def of_logits(
        self, logits: Tensor, teacher: Tensor | None, target: Tensor, class_weight: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        prepared = self.prepare(target, class_weight)
        divisor = self.divisor(prepared)
        loss, *others = self.formula(logits, teacher, target)
        columns = (
            (column if divisor is None else column / divisor).masked_fill(
                target == self.ignore_index, 0
            )
            for column in (loss, *(other.detach() for other in others))
        )
        return self.reduced(RowOutputs(*columns), prepared)

    def reduced(self, out: RowOutputs, prepared: Any) -> tuple[Tensor | None, ...]:
        if self.reduction == "none":
            return out.columns
        return tuple(None if column is None else column.sum() for column in out.columns)

    def output_likes(self, target: Tensor, dtype: torch.dtype) -> list[tuple[Any, torch.dtype]]:
        return [(target.shape if self.reduction == "none" else (), dtype)] * (1 + self.n_reported)
