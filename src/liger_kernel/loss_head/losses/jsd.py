"""Generalised Jensen-Shannon divergence between student and teacher (GKD, arXiv 2306.13649)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from liger_kernel.loss_head.losses.distillation import DistillationLoss
from liger_kernel.ops.jsd.contract import JSDOptions


def _kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p || q) per row."""
    return (log_p.exp() * (log_p - log_q)).sum(-1)


@dataclass(frozen=True)
class JSDLoss(DistillationLoss):
    """beta KL(t || m) + (1 - beta) KL(s || m), m = beta t + (1 - beta) s. With beta 0 KL(t || s), with 1 KL(s || t)."""

    name: ClassVar[str] = "jsd"

    beta: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        JSDOptions(self.beta)

    @property
    def form(self) -> tuple[str, float]:
        return JSDOptions(self.beta).form

    def soft(self, student: Tensor, teacher: Tensor, target: Tensor) -> Tensor:
        s, t = student.log_softmax(-1), teacher.log_softmax(-1)
        if self.beta == 0.0:
            return _kl(t, s)
        if self.beta == 1.0:
            return _kl(s, t)
        m = torch.logaddexp(s + math.log1p(-self.beta), t + math.log(self.beta))
        return self.beta * _kl(t, m) + (1 - self.beta) * _kl(s, m)
