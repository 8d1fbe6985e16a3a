"""KL divergence to the student from probabilities that are given."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from liger_kernel.loss_head.losses.distillation import DistillationLoss


@dataclass(frozen=True)
class KLDivLoss(DistillationLoss):
    """sum p (log max(p, eps) - log q); the teacher's rows are not logits, but p themselves.

    divisor_of_mean: by what a mean is divided besides the number of rows.
    """

    name: ClassVar[str] = "kl_div"
    of_logits_of_teacher: ClassVar[bool] = False

    eps: float = 1e-10
    divisor_of_mean: int = 1

    @property
    def form(self) -> tuple[str, float]:
        return "kl", self.eps

    def divisor(self, prepared: Tensor) -> Tensor | None:
        count = super().divisor(prepared)
        return None if count is None else count * self.divisor_of_mean

    def soft(self, student: Tensor, teacher: Tensor, target: Tensor) -> Tensor:
        log_p = teacher.clamp(min=self.eps).log()
        terms = teacher * (log_p - student.log_softmax(-1))
        return torch.where(teacher == 0, 0.0, terms).sum(-1)
