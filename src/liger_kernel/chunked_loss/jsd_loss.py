"""Distillation with the generalised Jensen-Shannon divergence (GKD, arXiv 2306.13649)."""

from __future__ import annotations

from liger_kernel.chunked_loss.fused_linear_distillation import (
    DistillationFunction,
    DistillationLoss,
)
from liger_kernel.loss_head.losses.jsd import JSDLoss


class LigerFusedLinearJSDFunction(DistillationFunction):
    rows = JSDLoss


class LigerFusedLinearJSDLoss(DistillationLoss):
    """Distillation with the generalised JSD, `chunk_size` rows at a time; `compiled` has no effect."""

    function = LigerFusedLinearJSDFunction
