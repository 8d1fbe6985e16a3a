"""KTO (arXiv 2402.01306): single sequences, each labelled desirable or not."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from liger_kernel._core.declared import LossFunction, LossModule, takes
from liger_kernel.chunked_loss.engine import reference_of
from liger_kernel.chunked_loss.options import LossOptions
from liger_kernel.chunked_loss.preference import LossAndMetrics, by_label, unpaired_loss


@dataclass(frozen=True)
class KTOOptions(LossOptions):
    """ignore_index: the label of tokens that do not count.
    beta: scale of the rewards.
    use_ref_model: compare with a reference model; without it, one that is passed is not read.
    average_log_prob: the mean over the tokens of a sequence instead of the sum.
    compiled, chunk_size: accepted, without effect; ValueError for a chunk_size that is no positive integer."""

    ignore_index: int = -100
    beta: float = 0.1
    compiled: bool = True
    use_ref_model: bool = False
    average_log_prob: bool = False
    chunk_size: int = 1


def sequence_loss(
    options: KTOOptions, ratio: Tensor, desirable: Tensor, kl: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The losses and the rewards of sequences from their log-ratio to the reference, all (B,)."""
    margin = options.beta * (ratio if kl is None else ratio - kl)
    losses = torch.where(desirable, -margin, margin).sigmoid()  # 1 - sigmoid(+-margin)
    return losses, options.beta * ratio


class LigerFusedLinearKTOLoss(LossModule):
    """KTO: `1 - sigmoid(+-beta * (log-ratio to the reference - kl))`, + for desirable sequences, which need no partner.

    A sequence without labelled tokens has loss 0.
    """

    @takes(KTOOptions)
    def __init__(self) -> None: ...

    @classmethod
    def compute(
        cls,
        options: Any,
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
        if kl is not None and kl.numel() != 1:
            raise ValueError(f"kl has shape {tuple(kl.shape)}; pass one number, () or (1,).")
        kl = None if kl is None else kl.detach().reshape(())

        def of_sequences(logps: Tensor, ref_logps: Tensor | None) -> tuple[Tensor, Tensor]:
            assert preference_labels is not None
            ratio = logps if ref_logps is None else logps - ref_logps
            return sequence_loss(options, ratio, preference_labels.bool(), kl)

        loss, sums, (rewards,) = unpaired_loss(
            of_sequences,
            *(_input, lin_weight, target, preference_labels, bias),
            reference=reference_of(options.use_ref_model, ref_input, ref_weight, ref_bias),
            ignore_index=options.ignore_index,
            average_log_prob=options.average_log_prob,
        )
        assert preference_labels is not None
        return loss, (*sums, *by_label(rewards, preference_labels))


class LigerFusedLinearKTOFunction(
    LossFunction,
    loss=LigerFusedLinearKTOLoss,
    first="_input lin_weight target preference_labels",
    use_ref_model=True,
):
    @staticmethod
    def preference_loss_fn(
        log_prob_chunk: Tensor,
        preference_labels_chunk: Tensor,
        full_target: Tensor,
        ref_log_prob_chunk: Tensor | None = None,
        beta: float = 0.1,
        kl: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The loss per sequence of `full_target` (B, T), and the sums of the chosen and of the rejected rewards, of
        log-probabilities of sequences."""
        ratio = log_prob_chunk if ref_log_prob_chunk is None else log_prob_chunk - ref_log_prob_chunk  # fmt: skip
        desirable = preference_labels_chunk.bool()
        losses, rewards = sequence_loss(KTOOptions(beta=beta), ratio, desirable, kl)
        return losses.sum() / full_target.shape[0], *by_label(rewards, desirable)
