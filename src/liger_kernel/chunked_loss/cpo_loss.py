"""CPO (arXiv 2401.08417): DPO without a reference model, with the NLL of the chosen tokens."""

from __future__ import annotations

import torch.nn as nn
from torch import Tensor

from liger_kernel.chunked_loss.engine import check_chunk_size
from liger_kernel.chunked_loss.preference import (
    LossAndMetrics,
    paired_loss,
    smoothed_sigmoid_loss,
)


class LigerFusedLinearCPOFunction:
    """`apply` in the argument order of the incumbent."""

    @staticmethod
    def apply(
        _input: Tensor,
        weight: Tensor,
        target: Tensor,
        bias: Tensor | None = None,
        ignore_index: int = -100,
        beta: float = 0.1,
        alpha: float = 1.0,
        label_smoothing: float = 0.0,
        compute_nll_loss: bool = True,
        compiled: bool = True,
        average_log_prob: bool = False,
        chunk_size: int = 1,
    ) -> LossAndMetrics:
        check_chunk_size(chunk_size)

        def pair_loss(chosen: Tensor, rejected: Tensor, *_: Tensor) -> tuple[Tensor, ...]:
            loss = smoothed_sigmoid_loss(beta * (chosen - rejected), label_smoothing)
            return loss, beta * chosen, beta * rejected

        return paired_loss(
            pair_loss,
            _input,
            weight,
            target,
            bias,
            ignore_index=ignore_index,
            alpha=alpha,
            compute_nll_loss=compute_nll_loss,
            average_log_prob=average_log_prob,
        )


class LigerFusedLinearCPOLoss(nn.Module):
    """CPO on the hidden states of chosen and rejected sequences; `compiled` and `chunk_size` have no effect."""

    def __init__(
        self,
        ignore_index: int = -100,
        beta: float = 0.1,
        alpha: float = 1.0,
        label_smoothing: float = 0.0,
        compute_nll_loss: bool = True,
        compiled: bool = True,
        average_log_prob: bool = False,
        chunk_size: int = 1,
    ):
        super().__init__()
        check_chunk_size(chunk_size)
        self.ignore_index = ignore_index
        self.beta = beta
        self.alpha = alpha
        self.label_smoothing = label_smoothing
        self.compute_nll_loss = compute_nll_loss
        self.compiled = compiled
        self.average_log_prob = average_log_prob
        self.chunk_size = chunk_size

    def forward(
        self, lin_weight: Tensor, _input: Tensor, target: Tensor, bias: Tensor | None = None
    ) -> LossAndMetrics:
        """Loss, and (chosen_logps (P,), rejected_logps (P,), chosen_logits_mean, rejected_logits_mean, nll_loss,
        chosen_rewards (P,), rejected_rewards (P,)) of `_input` (2P, T, H) and `target` (2P, T)."""
        return LigerFusedLinearCPOFunction.apply(
            _input,
            lin_weight,
            target,
            bias,
            self.ignore_index,
            self.beta,
            self.alpha,
            self.label_smoothing,
            self.compute_nll_loss,
            self.compiled,
            self.average_log_prob,
            self.chunk_size,
        )
