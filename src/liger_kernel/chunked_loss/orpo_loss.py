"""ORPO (arXiv 2403.07691): NLL of the chosen tokens plus the log of an odds ratio."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from liger_kernel._core.declared import LossFunction, takes
from liger_kernel.chunked_loss.preference import LossAndMetrics, PairLoss, PairOptions


@dataclass(frozen=True)
class ORPOOptions(PairOptions):
    """beta also weighs the odds ratio against the NLL of the chosen tokens, which is a part of the loss here."""

    ignore_index: int = -100
    beta: float = 0.1
    compute_nll_loss: bool = True
    compiled: bool = True
    chunk_size: int = 1
    average_log_prob = True  # no option: it defines the loss


def pair_loss(
    options: ORPOOptions, chosen: Tensor, rejected: Tensor, *_: Tensor
) -> tuple[Tensor, ...]:
    def log_one_minus_exp(logp: Tensor) -> Tensor:
        logp = logp.clamp(max=-torch.finfo(logp.dtype).eps)  # 0 is only rounded to be certain
        return (-logp.expm1()).log()  # keeps its digits where the probability is close to 1

    beta = options.beta
    log_odds = (chosen - rejected) - (log_one_minus_exp(chosen) - log_one_minus_exp(rejected))
    ratio = F.logsigmoid(log_odds)
    return -beta * ratio, beta * chosen, beta * rejected, ratio, log_odds


class LigerFusedLinearORPOLoss(PairLoss):
    """ORPO: the NLL of the chosen tokens plus `-beta * log sigmoid(log(odds of chosen / odds of rejected))`."""

    formula = staticmethod(pair_loss)

    @takes(ORPOOptions)
    def __init__(self) -> None: ...

    @classmethod
    def compute(
        cls,
        options: Any,
        lin_weight: Tensor,
        _input: Tensor,
        target: Tensor,
        bias: Tensor | None = None,
        nll_target: Tensor | None = None,
    ) -> LossAndMetrics:
        """Loss, and (chosen_logps (P,), rejected_logps (P,), chosen_logits_mean, rejected_logits_mean, nll_loss,
        chosen_rewards (P,), rejected_rewards (P,), log_odds_ratio, log_odds_chosen) of `_input` (2P, T, H) and
        `target` (2P, T); `nll_target` (2P, T) replaces the labels of the NLL."""
        return cls.of_pairs(options, lin_weight, _input, target, bias, nll_target=nll_target)


class LigerFusedLinearORPOFunction(
    LossFunction, loss=LigerFusedLinearORPOLoss, last="nll_target compiled chunk_size"
): ...
