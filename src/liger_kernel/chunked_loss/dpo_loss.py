"""DPO (arXiv 2305.18290) and the losses that share its shape."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from liger_kernel.chunked_loss.engine import check_chunk_size, reference_of
from liger_kernel.chunked_loss.preference import LossAndMetrics, paired_loss


def _exo_pair(a: Tensor, b: Tensor, beta: float, smoothing: float, tau: float) -> Tensor:
    """Reverse KL between the preference and its smoothed label (arXiv 2402.00856)."""
    d = beta * (a - b)
    agree = d.sigmoid() * (F.logsigmoid(d) - math.log1p(-smoothing))
    return agree + (-d).sigmoid() * (F.logsigmoid(-d) - math.log(smoothing))


def _robust(a: Tensor, b: Tensor, beta: float, smoothing: float, tau: float) -> Tensor:
    """Unbiased under a share `smoothing` of flipped labels (arXiv 2403.00409)."""
    d = beta * (a - b)
    loss = -(1 - smoothing) * F.logsigmoid(d) + smoothing * F.logsigmoid(-d)
    return loss / (1 - 2 * smoothing)


def _discopop(a: Tensor, b: Tensor, beta: float, smoothing: float, tau: float) -> Tensor:
    """Log-ratio modulated loss (arXiv 2406.08414)."""
    d = beta * (a - b)
    share = (d / tau).sigmoid()
    return -F.logsigmoid(d) * (1 - share) + (-d).exp() * share


#: (a, b, beta, label_smoothing, discopop_tau) -> loss; a and b: log-ratio to the reference, chosen and rejected
LOSSES: dict[str, Callable[..., Tensor]] = {
    "sigmoid": lambda a, b, beta, s, tau: -F.logsigmoid(beta * (a - b)),
    "hinge": lambda a, b, beta, s, tau: F.relu(1 - beta * (a - b)),
    "exo_pair": _exo_pair,
    "nca_pair": lambda a, b, beta, s, tau: (
        -F.logsigmoid(beta * a) - 0.5 * F.logsigmoid(-beta * a) - 0.5 * F.logsigmoid(-beta * b)
    ),
    "robust": _robust,
    "bco_pair": lambda a, b, beta, s, tau: -F.logsigmoid(beta * a) - F.logsigmoid(-beta * b),
    "sppo_hard": lambda a, b, beta, s, tau: (a - 0.5 / beta) ** 2 + (b + 0.5 / beta) ** 2,
    "apo_zero": lambda a, b, beta, s, tau: (-beta * a).sigmoid() + (beta * b).sigmoid(),
    "apo_down": lambda a, b, beta, s, tau: (beta * a).sigmoid() + (-beta * (a - b)).sigmoid(),
    "discopop": _discopop,
}


def check_loss_type(loss_type: str, label_smoothing: float) -> None:
    if loss_type not in LOSSES:
        raise ValueError(
            f"Unsupported loss_type: {loss_type}. Supported types are: {', '.join(sorted(LOSSES))}."
        )
    if loss_type == "exo_pair" and not 0.0 < label_smoothing < 1.0:
        raise ValueError(
            f"label_smoothing must be > 0 for loss_type='exo_pair' (and below 1), got {label_smoothing}."
        )
    if loss_type == "robust" and not 0.0 <= label_smoothing < 0.5:
        raise ValueError(
            f"label_smoothing must lie in [0.0, 0.5) for loss_type='robust', got {label_smoothing}."
        )


class LigerFusedLinearDPOFunction:
    """`apply` in the argument order of the incumbent."""

    @staticmethod
    def apply(
        _input: Tensor,
        weight: Tensor,
        target: Tensor,
        bias: Tensor | None = None,
        ref_input: Tensor | None = None,
        ref_weight: Tensor | None = None,
        ref_bias: Tensor | None = None,
        ignore_index: int = -100,
        beta: float = 0.1,
        compute_nll_loss: bool = False,
        compiled: bool = True,
        use_ref_model: bool = True,
        average_log_prob: bool = False,
        chunk_size: int = 1,
        loss_type: str = "sigmoid",
        label_smoothing: float = 0.0,
        discopop_tau: float = 0.05,
        alpha: float = 1.0,
    ) -> LossAndMetrics:
        check_chunk_size(chunk_size)
        check_loss_type(loss_type, label_smoothing)

        def pair_loss(
            chosen: Tensor, rejected: Tensor, ref_chosen: Tensor, ref_rejected: Tensor
        ) -> tuple[Tensor, ...]:
            a, b = chosen - ref_chosen, rejected - ref_rejected
            loss = LOSSES[loss_type](a, b, beta, label_smoothing, discopop_tau)
            return loss, beta * a, beta * b

        return paired_loss(
            pair_loss,
            _input,
            weight,
            target,
            bias,
            reference=reference_of(use_ref_model, ref_input, ref_weight, ref_bias),
            ignore_index=ignore_index,
            alpha=alpha,
            compute_nll_loss=compute_nll_loss,
            average_log_prob=average_log_prob,
        )


class LigerFusedLinearDPOLoss(nn.Module):
    """DPO on the hidden states of chosen and rejected sequences.

    Args:
        loss_type: one of sigmoid, hinge, exo_pair, nca_pair, robust, bco_pair, sppo_hard, apo_zero, apo_down,
            discopop. label_smoothing is read by exo_pair and robust, discopop_tau by discopop.
        alpha: weight of the NLL of the chosen tokens, with compute_nll_loss.
        average_log_prob: the mean over the tokens of a sequence instead of the sum.
        compiled, chunk_size: accepted; neither has an effect.

    Raises: ValueError for an unknown loss_type or a label_smoothing that it cannot use.
    """

    _SUPPORTED_LOSS_TYPES = frozenset(LOSSES)

    def __init__(
        self,
        ignore_index: int = -100,
        beta: float = 0.1,
        alpha: float = 1.0,
        compute_nll_loss: bool = False,
        compiled: bool = True,
        use_ref_model: bool = True,
        average_log_prob: bool = False,
        chunk_size: int = 1,
        loss_type: str = "sigmoid",
        label_smoothing: float = 0.0,
        discopop_tau: float = 0.05,
    ):
        super().__init__()
        check_loss_type(loss_type, label_smoothing)
        check_chunk_size(chunk_size)
        self.ignore_index = ignore_index
        self.beta = beta
        self.alpha = alpha
        self.compute_nll_loss = compute_nll_loss
        self.compiled = compiled
        self.use_ref_model = use_ref_model
        self.average_log_prob = average_log_prob
        self.chunk_size = chunk_size
        self.loss_type = loss_type
        self.label_smoothing = label_smoothing
        self.discopop_tau = discopop_tau

    def forward(
        self,
        lin_weight: Tensor,
        _input: Tensor,
        target: Tensor,
        bias: Tensor | None = None,
        ref_input: Tensor | None = None,
        ref_weight: Tensor | None = None,
        ref_bias: Tensor | None = None,
    ) -> Any:
        """Loss, and (chosen_logps (P,), rejected_logps (P,), chosen_logits_mean, rejected_logits_mean, nll_loss,
        chosen_rewards (P,), rejected_rewards (P,)) of `_input` (2P, T, H) and `target` (2P, T)."""
        return LigerFusedLinearDPOFunction.apply(
            _input,
            lin_weight,
            target,
            bias,
            ref_input,
            ref_weight,
            ref_bias,
            self.ignore_index,
            self.beta,
            self.compute_nll_loss,
            self.compiled,
            self.use_ref_model,
            self.average_log_prob,
            self.chunk_size,
            self.loss_type,
            self.label_smoothing,
            self.discopop_tau,
            self.alpha,
        )
