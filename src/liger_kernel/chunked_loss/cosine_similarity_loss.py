"""Distillation by the angle between the logits of student and teacher."""

from __future__ import annotations

from liger_kernel._core.declared import LossFunction, takes
from liger_kernel.chunked_loss.fused_linear_distillation import (
    FIRST,
    DistillationLoss,
    DistillationOptions,
)
from liger_kernel.loss_head.losses.cosine_similarity import CosineSimilarityLoss


class LigerFusedLinearCosineSimilarityLoss(DistillationLoss):
    """Distillation: cross entropy with the labels plus the cosine distance of the logits to a teacher's."""

    rows = CosineSimilarityLoss

    @takes(DistillationOptions)
    def __init__(self) -> None: ...


class LigerFusedLinearCosineSimilarityFunction(
    LossFunction, loss=LigerFusedLinearCosineSimilarityLoss, first=FIRST
): ...
