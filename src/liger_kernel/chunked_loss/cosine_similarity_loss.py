"""Distillation by the angle between the logits of student and teacher."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from liger_kernel.chunked_loss.fused_linear_distillation import (
    DistillationFunction,
    DistillationLoss,
)


class LigerFusedLinearCosineSimilarityFunction(DistillationFunction):
    @staticmethod
    def distillation_loss_fn(
        student_logits: Tensor,
        teacher_logits: Tensor,
        target: Tensor | None = None,
        ignore_index: int | None = None,
        beta: float = 1.0,
        **options: Any,
    ) -> Tensor:
        """Sum over the labelled rows of beta (1 - cos(student, teacher))."""
        rows = beta * (1 - F.cosine_similarity(student_logits, teacher_logits, dim=-1))
        if target is not None and ignore_index is not None:
            rows = rows.masked_fill(target == ignore_index, 0.0)
        return rows.sum()


class LigerFusedLinearCosineSimilarityLoss(DistillationLoss):
    """Distillation with the cosine distance, `chunk_size` rows at a time; `compiled` has no effect."""

    function = LigerFusedLinearCosineSimilarityFunction
