"""What the losses on pairs share: the first half of a batch is chosen, the second half rejected."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from liger_kernel._core.declared import LossModule
from liger_kernel.chunked_loss.engine import (
    Reference,
    check_sequences,
    loss_of_logps,
    reference_of,
    reference_token_logps,
    sequence_logit_sums,
    sequence_logps,
    token_logps,
)
from liger_kernel.chunked_loss.options import LossOptions
from liger_kernel.loss_head.label_count import count_labels

#: the loss and the metrics
LossAndMetrics = tuple[Tensor, tuple[Tensor, ...]]
#: (chosen, rejected, reference chosen, reference rejected) -> the loss and the metrics of every pair, all (P,)
PairFormula = Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, ...]]


class PairOptions(LossOptions):
    """ignore_index: the label of tokens that do not count.
    beta: scale of the rewards.
    compute_nll_loss: add `alpha` times the NLL of the chosen tokens; without it, alpha has no effect and is refused.
    average_log_prob: the mean over the tokens of a sequence instead of the sum.
    compiled, chunk_size: accepted, without effect; ValueError for a chunk_size that is no positive integer."""

    ignore_index: int
    alpha: float = 1.0  # these hold for a loss that does not offer them
    compute_nll_loss: bool = False
    average_log_prob: bool = False
    label_smoothing: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0.0 <= self.label_smoothing <= 1.0:
            raise ValueError(f"label_smoothing={self.label_smoothing} is not between 0.0 and 1.0.")
        if not self.compute_nll_loss and self.alpha not in (0.0, type(self).alpha):
            raise ValueError(
                f"alpha={self.alpha} weighs the NLL, which compute_nll_loss=False leaves out; "
                f"pass compute_nll_loss=True, or leave alpha at {type(self).alpha}."
            )


class PairLoss(LossModule):
    """A loss on pairs: the hidden states of chosen sequences, then of as many rejected ones."""

    #: (options, chosen, rejected, reference chosen, reference rejected), all (P,), the last two 0 without a reference
    #: -> the losses, the chosen rewards, the rejected rewards, and metrics whose means over the pairs are wanted
    formula: ClassVar[Callable[..., tuple[Tensor, ...]]]

    @classmethod
    def compute(
        cls,
        options: Any,
        lin_weight: Tensor,
        _input: Tensor,
        target: Tensor,
        bias: Tensor | None = None,
    ) -> LossAndMetrics:
        """Loss, and (chosen_logps (P,), rejected_logps (P,), chosen_logits_mean, rejected_logits_mean, nll_loss,
        chosen_rewards (P,), rejected_rewards (P,), and what the loss adds) of `_input` (2P, T, H), `target` (2P, T)."""
        return cls.of_pairs(options, lin_weight, _input, target, bias)

    @classmethod
    def of_pairs(
        cls,
        options: PairOptions,
        weight: Tensor,
        hidden: Tensor,
        target: Tensor,
        bias: Tensor | None,
        **more: Any,
    ) -> LossAndMetrics:
        loss, metrics = paired_loss(
            partial(cls.formula, options),
            hidden,
            weight,
            target,
            bias,
            ignore_index=options.ignore_index,
            alpha=options.alpha,
            compute_nll_loss=options.compute_nll_loss,
            average_log_prob=options.average_log_prob,
            **more,
        )
        means = (values.sum() / max(values.shape[0], 1) for values in metrics[7:])
        return loss, (*metrics[:7], *means)


class ReferencePairLoss(PairLoss):
    """A loss on pairs that compares with a frozen reference model, unless its option `use_ref_model` is False."""

    @classmethod
    def compute(
        cls,
        options: Any,
        lin_weight: Tensor,
        _input: Tensor,
        target: Tensor,
        bias: Tensor | None = None,
        ref_input: Tensor | None = None,
        ref_weight: Tensor | None = None,
        ref_bias: Tensor | None = None,
    ) -> LossAndMetrics:
        reference = reference_of(options.use_ref_model, ref_input, ref_weight, ref_bias)
        return cls.of_pairs(options, lin_weight, _input, target, bias, reference=reference)


def paired_loss(
    pair_loss: PairFormula,
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None = None,
    *,
    reference: Reference | None = None,
    ignore_index: int = -100,
    alpha: float = 1.0,
    compute_nll_loss: bool = False,
    nll_target: Tensor | None = None,
    average_log_prob: bool = False,
) -> LossAndMetrics:
    """alpha * NLL of the chosen tokens + the mean of `pair_loss` over the pairs, and the metrics.

    A pair with a side that has no labelled token compares nothing: its loss, its gradient and its metrics are 0.

    Args:
        hidden: (2P, T, H). weight: (V, H). target: (2P, T). bias: (V,).
        nll_target: (2P, T), the labels of the NLL; only the first half is read. None: `target`.

    Returns: the loss, at least fp32, and (chosen_logps (P,), rejected_logps (P,), chosen_logits_mean,
    rejected_logits_mean, nll_loss, *metrics of the loss), without gradient.
    Raises: ValueError for a batch that is not made of pairs.
    """
    check_sequences(hidden, target, weight, bias)
    batch, length = target.shape
    if batch % 2:
        raise ValueError(
            f"The batch has {batch} sequences, an odd number; pass the chosen ones and then as many rejected ones."
        )
    pairs = batch // 2
    rows = torch.arange(batch * length, device=target.device)
    by_pair = rows.view(2, pairs, length).transpose(0, 1).reshape(-1)
    groups: Any = {"group_size": 2 * length, "order": by_pair}
    count = count_labels(target, ignore_index, **groups)
    nll_count = None if nll_target is None else count_labels(nll_target[:pairs], ignore_index)
    # before the counts are waited for
    sums = sequence_logit_sums(hidden, weight, bias) / max(pairs * length * weight.shape[0], 1)
    labelled = target != ignore_index
    ref_logps = hidden.new_zeros(batch, dtype=torch.float32)
    if reference is not None:
        ref_tokens = reference_token_logps(reference, target, ignore_index, label_count=count)
        ref_logps = sequence_logps(ref_tokens, labelled, average_log_prob)
    has_labels = labelled.any(1)
    compares = has_labels[:pairs] & has_labels[pairs:]
    n_chosen = labelled[:pairs].sum().clamp(min=1)

    def of_logps(tokens: Tensor) -> tuple[Tensor, list[Tensor]]:
        logps = sequence_logps(tokens, labelled, average_log_prob)
        # log-probability 0 is a singular point of the odds ratio; its NaN would come back through `where`
        sides = [
            side.masked_fill(~compares, -1.0)
            for both in (logps, ref_logps.to(logps.dtype))
            for side in (both[:pairs], both[pairs:])
        ]
        losses, *metrics = (found.masked_fill(~compares, 0.0) for found in pair_loss(*sides))
        loss = losses.sum() / max(pairs, 1)
        nll_loss = torch.zeros_like(loss)
        if compute_nll_loss and nll_target is None:
            nll_loss = -tokens[:pairs].sum() / n_chosen
            loss = loss + alpha * nll_loss
        return loss, [logps[:pairs], logps[pairs:], nll_loss, *metrics]

    loss, (chosen, rejected, nll_loss, *metrics) = loss_of_logps(
        of_logps, hidden, weight, target, bias, ignore_index, label_count=count, **groups
    )
    if compute_nll_loss and nll_target is not None:
        labels = nll_target[:pairs]
        tokens = token_logps(
            hidden[:pairs], weight, labels, bias, ignore_index, label_count=nll_count
        )
        nll_loss = -tokens.sum() / (labels != ignore_index).sum().clamp(min=1)
        loss = loss + alpha * nll_loss
    means = sums[:pairs].sum(), sums[pairs:].sum()
    return loss, (chosen, rejected, *means, nll_loss.detach(), *metrics)


#: (logps (B,), those of the reference or None) -> the loss and the metrics of every sequence, all (B,)
SequenceFormula = Callable[[Tensor, Tensor | None], tuple[Tensor, ...]]


def unpaired_loss(
    sequence_loss: SequenceFormula,
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    preference_labels: Tensor | None,
    bias: Tensor | None = None,
    *,
    reference: Reference | None = None,
    ignore_index: int = -100,
    average_log_prob: bool = False,
) -> tuple[Tensor, tuple[Tensor, ...], list[Tensor]]:
    """The mean of `sequence_loss` over the sequences, of which one without a labelled token has loss 0.

    hidden: (B, T, H). target: (B, T). preference_labels: (B,), which sequences are desirable.
    Returns: the loss, (chosen_logps_sum, rejected_logps_sum, chosen_logits_sum, rejected_logits_sum), and the metrics
    of the sequences, each (B,); only the loss carries a gradient.
    """
    check_sequences(hidden, target, weight, bias)
    batch, length = target.shape
    if preference_labels is None or preference_labels.shape != (batch,):
        found = None if preference_labels is None else tuple(preference_labels.shape)
        raise ValueError(
            f"preference_labels must be provided, one per sequence: shape ({batch},), got {found}."
        )
    count = count_labels(target, ignore_index, group_size=length)
    logits = sequence_logit_sums(hidden, weight, bias)  # before the count is waited for
    labelled = target != ignore_index
    ref_logps: Tensor | None = None
    if reference is not None:
        ref_tokens = reference_token_logps(reference, target, ignore_index, label_count=count)
        ref_logps = sequence_logps(ref_tokens, labelled, average_log_prob)

    def of_logps(tokens: Tensor) -> tuple[Tensor, list[Tensor]]:
        logps = sequence_logps(tokens, labelled, average_log_prob)
        losses, *metrics = sequence_loss(logps, ref_logps)
        loss = losses.masked_fill(~labelled.any(1), 0.0).sum() / max(batch, 1)
        return loss, [logps, *metrics]

    loss, (logps, *metrics) = loss_of_logps(
        of_logps,
        *(hidden, weight, target, bias, ignore_index),
        group_size=length,
        label_count=count,
    )
    sums = (side for values in (logps, logits) for side in by_label(values, preference_labels))
    return loss, tuple(sums), metrics


def by_label(values: Tensor, preference_labels: Tensor) -> tuple[Tensor, Tensor]:
    """The sums of `values` (B,) over the desirable and over the undesirable sequences."""
    desirable = preference_labels.bool()
    return values.masked_fill(~desirable, 0.0).sum(), values.masked_fill(desirable, 0.0).sum()


def smoothed_sigmoid_loss(margin: Tensor, label_smoothing: float) -> Tensor:
    """-log sigmoid(margin), with a share `label_smoothing` of the labels taken to be flipped."""
    return -(1 - label_smoothing) * F.logsigmoid(margin) - label_smoothing * F.logsigmoid(-margin)
