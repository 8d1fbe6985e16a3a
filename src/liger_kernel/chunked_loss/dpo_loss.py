"""DPO (arXiv 2305.18290) and the losses that share its shape."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch.nn.functional as F
from torch import Tensor

from liger_kernel._core.declared import LossFunction, takes
from liger_kernel.chunked_loss.preference import (
    PairOptions,
    ReferencePairLoss,
    smoothed_sigmoid_loss,
)


@dataclass(frozen=True)
class DPOOptions(PairOptions):
    """loss_type: one of sigmoid, hinge, exo_pair, nca_pair, robust, bco_pair, sppo_hard, apo_zero, apo_down, discopop.
    label_smoothing: the share of pairs that are taken to be labelled the wrong way round (sigmoid: cDPO; exo_pair;
    robust). discopop_tau: temperature of discopop's modulation. Other loss types refuse them.
    use_ref_model: compare with the reference model whose hidden states and head are passed.

    Raises: ValueError for an unknown loss_type, or an option that it cannot use."""

    positive = ("discopop_tau",)
    read_by: ClassVar = {
        "label_smoothing": ("sigmoid", "exo_pair", "robust"),
        "discopop_tau": ("discopop",),
    }

    ignore_index: int = -100
    beta: float = 0.1
    alpha: float = 1.0
    compute_nll_loss: bool = False
    compiled: bool = True
    use_ref_model: bool = True
    average_log_prob: bool = False
    chunk_size: int = 1
    loss_type: str = "sigmoid"
    label_smoothing: float = 0.0
    discopop_tau: float = 0.05

    def __post_init__(self) -> None:
        if self.loss_type not in LOSSES:
            raise ValueError(
                f"Unsupported loss_type: {self.loss_type}. Supported types are: {', '.join(sorted(LOSSES))}."
            )
        super().__post_init__()
        smoothing = self.label_smoothing
        if self.loss_type == "exo_pair" and not 0.0 < smoothing < 1.0:
            raise ValueError(
                f"label_smoothing must be > 0 for loss_type='exo_pair' (and below 1), got {smoothing}."
            )
        if self.loss_type == "robust" and not 0.0 <= smoothing < 0.5:
            raise ValueError(
                f"label_smoothing must lie in [0.0, 0.5) for loss_type='robust', got {smoothing}."
            )


def _exo_pair(o: DPOOptions, a: Tensor, b: Tensor) -> Tensor:
    """Reverse KL between the preference and its smoothed label (arXiv 2402.00856)."""
    d, smoothing = o.beta * (a - b), o.label_smoothing
    agree = d.sigmoid() * (F.logsigmoid(d) - math.log1p(-smoothing))
    return agree + (-d).sigmoid() * (F.logsigmoid(-d) - math.log(smoothing))


def _robust(o: DPOOptions, a: Tensor, b: Tensor) -> Tensor:
    """Unbiased under a share `label_smoothing` of flipped labels (arXiv 2403.00409)."""
    d, smoothing = o.beta * (a - b), o.label_smoothing
    loss = -(1 - smoothing) * F.logsigmoid(d) + smoothing * F.logsigmoid(-d)
    return loss / (1 - 2 * smoothing)


def _discopop(o: DPOOptions, a: Tensor, b: Tensor) -> Tensor:
    """Log-ratio modulated loss (arXiv 2406.08414)."""
    d = o.beta * (a - b)
    share = d / o.discopop_tau  # its sigmoid vanishes where e^-d overflows
    return -F.logsigmoid(d) * (-share).sigmoid() + (F.logsigmoid(share) - d).exp()


#: (options, a, b) -> loss; a and b: log-ratio to the reference, chosen and rejected
LOSSES: dict[str, Callable[[DPOOptions, Tensor, Tensor], Tensor]] = {
    "sigmoid": lambda o, a, b: smoothed_sigmoid_loss(o.beta * (a - b), o.label_smoothing),
    "hinge": lambda o, a, b: F.relu(1 - o.beta * (a - b)),
    "exo_pair": _exo_pair,
    "nca_pair": lambda o, a, b: (
        -F.logsigmoid(o.beta * a)
        - 0.5 * F.logsigmoid(-o.beta * a)
        - 0.5 * F.logsigmoid(-o.beta * b)
    ),
    "robust": _robust,
    "bco_pair": lambda o, a, b: -F.logsigmoid(o.beta * a) - F.logsigmoid(-o.beta * b),
    "sppo_hard": lambda o, a, b: (a - 0.5 / o.beta) ** 2 + (b + 0.5 / o.beta) ** 2,
    "apo_zero": lambda o, a, b: (-o.beta * a).sigmoid() + (o.beta * b).sigmoid(),
    "apo_down": lambda o, a, b: (o.beta * a).sigmoid() + (-o.beta * (a - b)).sigmoid(),
    "discopop": _discopop,
}


def pair_loss(
    options: DPOOptions,
    chosen: Tensor,
    rejected: Tensor,
    ref_chosen: Tensor | float,
    ref_rejected: Tensor | float,
) -> tuple[Tensor, ...]:
    a, b = chosen - ref_chosen, rejected - ref_rejected
    return LOSSES[options.loss_type](options, a, b), options.beta * a, options.beta * b


class LigerFusedLinearDPOLoss(ReferencePairLoss):
    """DPO on the hidden states of chosen and rejected sequences."""

    formula = staticmethod(pair_loss)
    _SUPPORTED_LOSS_TYPES = frozenset(LOSSES)

    @takes(DPOOptions)
    def __init__(self) -> None: ...


class LigerFusedLinearDPOFunction(LossFunction, loss=LigerFusedLinearDPOLoss, last="alpha"):
    @staticmethod
    def preference_loss_fn(
        chosen_logps: Tensor,
        rejected_logps: Tensor,
        full_target: Tensor,
        ref_chosen_logps: Tensor | None = None,
        ref_rejected_logps: Tensor | None = None,
        **options: Any,
    ) -> tuple[Tensor, ...]:
        """The loss per pair of `full_target` (2P, T), and the rewards, of log-probabilities of sequences; `options`
        are those of the module that such a loss can read."""
        refs = (0.0 if ref is None else ref for ref in (ref_chosen_logps, ref_rejected_logps))
        loss, *rewards = pair_loss(DPOOptions(**options), chosen_logps, rejected_logps, *refs)
        return loss.sum() / (full_target.shape[0] // 2), *rewards
