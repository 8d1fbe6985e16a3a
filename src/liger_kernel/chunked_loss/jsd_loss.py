"""Distillation with the generalised Jensen-Shannon divergence (GKD, arXiv 2306.13649)."""

from __future__ import annotations

from liger_kernel._core.declared import LossFunction, takes
from liger_kernel.chunked_loss.fused_linear_distillation import (
    FIRST,
    DistillationLoss,
    DistillationOptions,
)
from liger_kernel.loss_head.losses.jsd import JSDLoss


class LigerFusedLinearJSDLoss(DistillationLoss):
    """Distillation with the generalised JSD between student and teacher."""

    rows = JSDLoss

    @takes(DistillationOptions)
    def __init__(self) -> None: ...


class LigerFusedLinearJSDFunction(LossFunction, loss=LigerFusedLinearJSDLoss, first=FIRST): ...
