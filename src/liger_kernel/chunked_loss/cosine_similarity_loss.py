"""Distillation by the angle between the logits of student and teacher."""

from __future__ import annotations

from liger_kernel.chunked_loss.fused_linear_distillation import (
    DistillationFunction,
    DistillationLoss,
)
from liger_kernel.loss_head.losses.cosine_similarity import CosineSimilarityLoss


class LigerFusedLinearCosineSimilarityFunction(DistillationFunction):
    rows = CosineSimilarityLoss


class LigerFusedLinearCosineSimilarityLoss(DistillationLoss):
    """Distillation with the cosine distance, `chunk_size` rows at a time; `compiled` has no effect."""

    function = LigerFusedLinearCosineSimilarityFunction
