"""KTO (arXiv 2402.01306): single sequences, each labelled desirable or not."""

from __future__ import annotations

import torch
import torch.nn as nn
from torch import Tensor

from liger_kernel.chunked_loss.engine import (
    check_chunk_size,
    check_sequences,
    loss_of_logps,
    reference_of,
    reference_token_logps,
    sequence_logit_sums,
    sequence_logps,
)
from liger_kernel.chunked_loss.preference import LossAndMetrics


class LigerFusedLinearKTOFunction:
    """`apply` in the argument order of the incumbent."""

    @staticmethod
    def apply(
        _input: Tensor,
        weight: Tensor,
        target: Tensor,
        preference_labels: Tensor,
        bias: Tensor | None = None,
        ref_input: Tensor | None = None,
        ref_weight: Tensor | None = None,
        ref_bias: Tensor | None = None,
        kl: Tensor | None = None,
        ignore_index: int = -100,
        beta: float = 0.1,
        compiled: bool = True,
        use_ref_model: bool = True,
        average_log_prob: bool = False,
        chunk_size: int = 1,
    ) -> LossAndMetrics:
        check_chunk_size(chunk_size)
        check_sequences(_input, target)
        batch = target.shape[0]
        if preference_labels is None or preference_labels.shape != (batch,):
            found = None if preference_labels is None else tuple(preference_labels.shape)
            raise ValueError(
                f"preference_labels must be provided, one per sequence: shape ({batch},), got {found}."
            )
        reference = reference_of(use_ref_model, ref_input, ref_weight, ref_bias)
        labelled = target != ignore_index
        ref_logps = None
        if reference is not None:
            ref_tokens = reference_token_logps(reference, target, ignore_index)
            ref_logps = sequence_logps(ref_tokens, labelled, average_log_prob)
        desirable = preference_labels.bool()

        def of_logps(tokens: Tensor) -> tuple[Tensor, list[Tensor]]:
            logps = sequence_logps(tokens, labelled, average_log_prob)
            ratio = logps if ref_logps is None else logps - ref_logps
            margin = beta * (ratio if kl is None else ratio - kl.detach())
            losses = torch.where(desirable, -margin, margin).sigmoid()  # 1 - sigmoid(+-margin)
            loss = losses.masked_fill(~labelled.any(1), 0.0).sum() / max(batch, 1)
            return loss, [logps, beta * ratio]

        loss, (logps, rewards) = loss_of_logps(
            of_logps, _input, weight, target, bias, ignore_index, unit=target.shape[1]
        )
        logits = sequence_logit_sums(_input, weight, bias)
        metrics = tuple(
            values.masked_fill(~side, 0.0).sum()
            for values in (logps, logits, rewards)
            for side in (desirable, ~desirable)
        )
        return loss, metrics


class LigerFusedLinearKTOLoss(nn.Module):
    """KTO on hidden states.

    Without `use_ref_model` a reference that is passed is not read. A sequence without labelled tokens has loss 0.
    `compiled` and `chunk_size` are accepted; neither has an effect.
    """

    def __init__(
        self,
        ignore_index: int = -100,
        beta: float = 0.1,
        compiled: bool = True,
        use_ref_model: bool = False,
        average_log_prob: bool = False,
        chunk_size: int = 1,
    ):
        super().__init__()
        check_chunk_size(chunk_size)
        self.ignore_index = ignore_index
        self.beta = beta
        self.compiled = compiled
        self.use_ref_model = use_ref_model
        self.average_log_prob = average_log_prob
        self.chunk_size = chunk_size

    def forward(
        self,
        _input: Tensor,
        lin_weight: Tensor,
        target: Tensor,
        bias: Tensor | None = None,
        preference_labels: Tensor | None = None,
        ref_input: Tensor | None = None,
        ref_weight: Tensor | None = None,
        ref_bias: Tensor | None = None,
        kl: Tensor | None = None,
    ) -> LossAndMetrics:
        """Loss, and the sums over the desirable and the undesirable sequences (chosen_logps_sum, rejected_logps_sum,
        chosen_logits_sum, rejected_logits_sum, chosen_rewards_sum, rejected_rewards_sum), all 0-d.

        _input: (B, T, H). target: (B, T). preference_labels: (B,), True where desirable. kl: 0-d or (1,), the
        estimate of the KL divergence to the reference model that rewards are compared with."""
        return LigerFusedLinearKTOFunction.apply(
            _input,
            lin_weight,
            target,
            preference_labels,  # type: ignore[arg-type]  # None raises there
            bias,
            ref_input,
            ref_weight,
            ref_bias,
            kl,
            self.ignore_index,
            self.beta,
            self.compiled,
            self.use_ref_model,
            self.average_log_prob,
            self.chunk_size,
        )
