"""What the distillation losses share: a soft loss against a teacher's logits and the hard loss against the labels."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from liger_kernel.loss_head.row_loss import FormulaLoss


@dataclass(frozen=True)
class DistillationLoss(FormulaLoss):
    """`hard_weight * cross entropy + soft_weight * soft`, a mean over the labels that are not ignored.

    Logits of both models are divided by `temperature` in the soft loss. There, a class that only one of the two has,
    one of the last of the larger vocabulary, counts as a logit of 0 of the other. Returns (loss, soft loss, hard loss).
    """

    reads_teacher: ClassVar[bool] = True
    n_reported: ClassVar[int] = 2

    hard_weight: float = 0.5
    soft_weight: float = 0.5
    temperature: float = 1.0
    hard: bool = True  # False: the cross entropy is not even computed

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
        student, teacher = logits / self.temperature, teacher / self.temperature
        if extra > 0:
            student = F.pad(student, (0, extra))
        elif extra < 0:
            teacher = F.pad(teacher, (0, -extra))
        soft = self.soft(student, teacher, target)
        return self.hard_weight * hard + self.soft_weight * soft, soft, hard
