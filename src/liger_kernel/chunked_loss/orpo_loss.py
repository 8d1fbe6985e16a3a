"""ORPO (arXiv 2403.07691): NLL of the chosen tokens plus the log of an odds ratio."""

from __future__ import annotations

import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from liger_kernel.chunked_loss.engine import check_chunk_size
from liger_kernel.chunked_loss.preference import LossAndMetrics, paired_loss


class LigerFusedLinearORPOFunction:
    """`apply` in the argument order of the incumbent."""

    @staticmethod
    def apply(
        _input: Tensor,
        weight: Tensor,
        target: Tensor,
        bias: Tensor | None = None,
        ignore_index: int = -100,
        beta: float = 0.1,
        compute_nll_loss: bool = True,
        nll_target: Tensor | None = None,
        compiled: bool = True,
        chunk_size: int = 1,
    ) -> LossAndMetrics:
        check_chunk_size(chunk_size)

        def log_one_minus_exp(logp: Tensor) -> Tensor:
            return (-logp.expm1()).log()  # keeps its digits where the probability is close to 1

        def pair_loss(chosen: Tensor, rejected: Tensor, *_: Tensor) -> tuple[Tensor, ...]:
            log_odds = (chosen - rejected) - (
                log_one_minus_exp(chosen) - log_one_minus_exp(rejected)
            )
            ratio = F.logsigmoid(log_odds)
            return -beta * ratio, beta * chosen, beta * rejected, ratio, log_odds

        loss, (*metrics, ratio, log_odds) = paired_loss(
            pair_loss,
            _input,
            weight,
            target,
            bias,
            ignore_index=ignore_index,
            compute_nll_loss=compute_nll_loss,
            nll_target=nll_target,
            average_log_prob=True,
        )
        pairs = max(ratio.shape[0], 1)
        return loss, (*metrics, ratio.sum() / pairs, log_odds.sum() / pairs)


class LigerFusedLinearORPOLoss(nn.Module):
    """ORPO on the hidden states of chosen and rejected sequences; `compiled` and `chunk_size` have no effect."""

    def __init__(
        self,
        ignore_index: int = -100,
        beta: float = 0.1,
        compute_nll_loss: bool = True,
        compiled: bool = True,
        chunk_size: int = 1,
    ):
        super().__init__()
        check_chunk_size(chunk_size)
        self.ignore_index = ignore_index
        self.beta = beta
        self.compute_nll_loss = compute_nll_loss
        self.compiled = compiled
        self.chunk_size = chunk_size

    def forward(
        self,
        lin_weight: Tensor,
        _input: Tensor,
        target: Tensor,
        bias: Tensor | None = None,
        nll_target: Tensor | None = None,
    ) -> LossAndMetrics:
        """Loss, and (chosen_logps (P,), rejected_logps (P,), chosen_logits_mean, rejected_logits_mean, nll_loss,
        chosen_rewards (P,), rejected_rewards (P,), log_odds_ratio, log_odds_chosen) of `_input` (2P, T, H) and
        `target` (2P, T); `nll_target` (2P, T) replaces the labels of the NLL."""
        return LigerFusedLinearORPOFunction.apply(
            _input,
            lin_weight,
            target,
            bias,
            self.ignore_index,
            self.beta,
            self.compute_nll_loss,
            nll_target,
            self.compiled,
            self.chunk_size,
        )
