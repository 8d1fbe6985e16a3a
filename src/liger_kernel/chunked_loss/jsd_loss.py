"""Generalised Jensen-Shannon divergence between student and teacher (GKD, arXiv 2306.13649)."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from liger_kernel.chunked_loss.fused_linear_distillation import (
    DistillationFunction,
    DistillationLoss,
)


def _kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p || q) per row."""
    return (log_p.exp() * (log_p - log_q)).sum(-1)


class LigerFusedLinearJSDFunction(DistillationFunction):
    @staticmethod
    def distillation_loss_fn(
        student_logits: Tensor,
        teacher_logits: Tensor,
        beta: float = 0.5,
        target: Tensor | None = None,
        ignore_index: int = -100,
        **options: Any,
    ) -> Tensor:
        """Sum over the labelled rows of beta KL(t||m) + (1-beta) KL(s||m), m = beta t + (1-beta) s.

        beta=0 is KL(t||s), beta=1 is KL(s||t).
        """
        if not 0.0 <= beta <= 1.0:
            raise ValueError(f"beta={beta} is not between 0.0 and 1.0.")
        s, t = student_logits.log_softmax(-1), teacher_logits.log_softmax(-1)
        if beta == 0.0:
            rows = _kl(t, s)
        elif beta == 1.0:
            rows = _kl(s, t)
        else:
            m = torch.logaddexp(s + math.log1p(-beta), t + math.log(beta))
            rows = beta * _kl(t, m) + (1 - beta) * _kl(s, m)
        return (rows if target is None else rows.masked_fill(target == ignore_index, 0.0)).sum()


class LigerFusedLinearJSDLoss(DistillationLoss):
    """Distillation with the generalised JSD, `chunk_size` rows at a time; `compiled` has no effect."""

    function = LigerFusedLinearJSDFunction
