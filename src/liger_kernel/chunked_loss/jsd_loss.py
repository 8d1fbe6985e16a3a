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
    """Distillation: cross entropy with the labels plus the generalised JSD to a teacher, both weighed."""

    rows = JSDLoss

    @takes(DistillationOptions)
    def __init__(self) -> None: ...


class LigerFusedLinearJSDFunction(LossFunction, loss=LigerFusedLinearJSDLoss, first=FIRST): ...
