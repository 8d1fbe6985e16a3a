"""Distillation by the angle between the logits of student and teacher."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor

from liger_kernel.loss_head.losses.distillation import DistillationLoss


@dataclass(frozen=True)
class CosineSimilarityLoss(DistillationLoss):
    """beta (1 - cos(student, teacher))."""

    name: ClassVar[str] = "cosine_similarity"

    beta: float = 0.5

    @property
    def form(self) -> tuple[str, float]:
        return "cosine", self.beta

    def soft(self, student: Tensor, teacher: Tensor, target: Tensor) -> Tensor:
        return self.beta * (1 - F.cosine_similarity(student, teacher, dim=-1))
