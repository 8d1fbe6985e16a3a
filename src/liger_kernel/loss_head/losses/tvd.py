"""Total variation distance between student and teacher."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from liger_kernel.loss_head.losses.distillation import DistillationLoss


@dataclass(frozen=True)
class TVDLoss(DistillationLoss):
    """sum |p - q| / 2."""

    name: ClassVar[str] = "tvd"

    @property
    def form(self) -> tuple[str, float]:
        return "tvd", 0.0

    def soft(self, student: Tensor, teacher: Tensor, target: Tensor) -> Tensor:
        return 0.5 * (student.softmax(-1) - teacher.softmax(-1)).abs().sum(-1)
