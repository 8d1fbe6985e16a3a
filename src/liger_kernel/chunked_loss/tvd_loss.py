"""Distillation by the total variation distance to a teacher (arXiv 2307.15190)."""

from __future__ import annotations

from dataclasses import dataclass

from liger_kernel._core.declared import LossFunction, takes
from liger_kernel.chunked_loss.fused_linear_distillation import FIRST, DistillationLoss
from liger_kernel.chunked_loss.options import LossOptions
from liger_kernel.loss_head.losses.tvd import TVDLoss


@dataclass(frozen=True)
class TVDOptions(LossOptions):
    """weight_hard_loss, weight_soft_loss: of the cross entropy and of the distance to the teacher.
    temperature: both models' logits are divided by it in the soft loss. chunk_size: rows of logits held at a time.
    return_soft_hard_loss: return (loss, soft loss, hard loss). compiled: accepted, without effect.

    Raises: ValueError for a temperature or a chunk_size that is not positive."""

    positive = ("temperature",)

    weight_hard_loss: float = 0.5
    weight_soft_loss: float = 0.5
    ignore_index: int = -100
    temperature: float = 1.0
    compiled: bool = True
    chunk_size: int = 1024
    return_soft_hard_loss: bool = False


class LigerFusedLinearTVDLoss(DistillationLoss):
    """Distillation: cross entropy with the labels plus the total variation distance (TVD) to a teacher, weighed."""

    rows = TVDLoss

    @takes(TVDOptions)
    def __init__(self) -> None: ...


class LigerFusedLinearTVDFunction(LossFunction, loss=LigerFusedLinearTVDLoss, first=FIRST): ...
