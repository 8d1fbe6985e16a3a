"""What the distillation losses share: a soft loss against a teacher's logits and the hard loss against the labels."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from liger_kernel._core.rows import RowOutputs
from liger_kernel.backends import kernels_of
from liger_kernel.loss_head.row_loss import FormulaLoss
from liger_kernel.ops.cross_entropy import check_class_indices


def counted_rows(
    labels: Tensor | None, hidden: Tensor, weight: Tensor, ignore_index: int
) -> Tensor:
    """(N,) labels of a loss that only reads which of them are `ignore_index`: the others become one class."""
    a_class = weight.shape[0] - 1 if ignore_index == 0 else 0
    if labels is None:
        return hidden.new_full(hidden.shape[:1], a_class, dtype=torch.int64)
    if labels.shape != hidden.shape[:1]:
        raise ValueError(
            f"shift_labels has shape {tuple(labels.shape)}, but there are {hidden.shape[0]} rows; "
            f"pass a tensor of shape ({hidden.shape[0]},)."
        )
    check_class_indices(labels)
    return torch.where(labels == ignore_index, ignore_index, a_class)


@dataclass(frozen=True)
class DistillationLoss(FormulaLoss):
    """`hard_weight * cross entropy + soft_weight * soft`, a mean over the labels that are not ignored.

    Logits of both models are divided by `temperature` in the soft loss. There, a class that only one of the two has,
    one of the last of the larger vocabulary, counts as a logit of 0 of the other. Returns (loss, soft loss, hard loss).
    """

    reads_teacher: ClassVar[bool] = True
    of_logits_of_teacher: ClassVar[bool] = True  # False: of probabilities
    n_reported: ClassVar[int] = 2

    hard_weight: float = 0.5
    soft_weight: float = 0.5
    temperature: float = 1.0
    hard: bool = True  # False: the cross entropy is not even computed

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.temperature <= 0:
            raise ValueError(f"temperature must be positive, got {self.temperature}.")

    @property
    def form(self) -> tuple[str, float] | None:
        """What the kernel of `liger_kernel.ops.fused_ce_tvd` calls the soft loss, and the number in it."""
        return None

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
        how: dict[str, Any] = {"out": out, "grad": grad, "row_scale": row_scale}
        kernels: Any = None if self.form is None else kernels_of("fused_ce_tvd", logits)
        if hasattr(kernels, "step"):
            count = self.divisor(prepared)
            kernels.step(logits, teacher, target, distance=self, count=count, **how)
        else:
            super().step(logits, teacher, target, prepared, **how)

    @abstractmethod
    def soft(self, student: Tensor, teacher: Tensor, target: Tensor) -> Tensor:
        """(C,) from logits (C, the larger vocabulary), at least fp32, divided by the temperature."""

    def formula(
        self, logits: Tensor, teacher: Tensor | None, target: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        assert teacher is not None
        hard = torch.zeros_like(logits[:, 0])
        if self.hard:
            index = self.ignore_index
            hard = F.cross_entropy(logits, target, ignore_index=index, reduction="none")
        extra = teacher.shape[1] - logits.shape[1]
        student = logits / self.temperature
        if self.of_logits_of_teacher:
            teacher = teacher / self.temperature
        if extra > 0:
            student = F.pad(student, (0, extra))
        elif extra < 0:
            teacher = F.pad(teacher, (0, -extra))
        soft = self.soft(student, teacher, target)
        return self.hard_weight * hard + self.soft_weight * soft, soft, hard
