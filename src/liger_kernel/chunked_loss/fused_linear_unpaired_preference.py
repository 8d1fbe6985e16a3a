"""Losses on single sequences, each labelled desirable or not; and the base of those that other projects write."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from liger_kernel.chunked_loss.engine import (
    check_sequences,
    loss_of_logps,
    reference_of,
    reference_token_logps,
    sequence_logit_sums,
    sequence_logps,
)
from liger_kernel.chunked_loss.gradients import GradientsInForward
from liger_kernel.chunked_loss.options import check_chunk_size
from liger_kernel.chunked_loss.preference import LossAndMetrics


def unpaired_loss(
    of_sequences: Callable[..., tuple[Tensor, list[Tensor]]],
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    preference_labels: Tensor | None,
    *,
    reference: Any,
    ignore_index: int,
    average_log_prob: bool,
) -> LossAndMetrics:
    """`of_sequences(logps, desirable, ref_logps, empty)`, all (B,), gives the loss and metrics, 0-d or (B,).

    Returns: the loss, and for log-probabilities, logits and each metric (B,) the sums over the desirable and over the
    other sequences; a metric that is 0-d as it is.
    """
    check_sequences(hidden, target)
    batch, length = target.shape
    if preference_labels is None or preference_labels.shape != (batch,):
        found = None if preference_labels is None else tuple(preference_labels.shape)
        raise ValueError(
            f"preference_labels must be provided, one per sequence: shape ({batch},), got {found}."
        )
    labelled, desirable = target != ignore_index, preference_labels.bool()
    ref_logps: Tensor | None = None
    if reference is not None:
        ref_tokens = reference_token_logps(reference, target, ignore_index)
        ref_logps = sequence_logps(ref_tokens, labelled, average_log_prob)

    def of_logps(tokens: Tensor) -> tuple[Tensor, list[Tensor]]:
        logps = sequence_logps(tokens, labelled, average_log_prob)
        loss, metrics = of_sequences(logps, desirable, ref_logps, ~labelled.any(1))
        return loss, [logps, *metrics]

    loss, (logps, *metrics) = loss_of_logps(
        of_logps, hidden, weight, target, bias, ignore_index, group_size=length
    )
    sums: list[Tensor] = []
    for values in (logps, sequence_logit_sums(hidden, weight, bias), *metrics):
        sides = (desirable, ~desirable) if values.ndim else ()
        sums += [values.masked_fill(~side, 0.0).sum() for side in sides] or [values]
    return loss, tuple(sums)


class LigerFusedLinearUnpairedPreferenceBase(GradientsInForward):
    """A subclass gives `preference_loss_fn(log_prob_chunk, preference_labels_chunk, full_target, ref_log_prob_chunk=,
    ...)`: the sum over the sequences, divided by those of `full_target`; or a tuple of that and of metrics, each 0-d.
    It is called once, with all sequences.
    """

    @staticmethod
    def preference_loss_fn(
        log_prob_chunk: Tensor,
        preference_labels_chunk: Tensor,
        full_target: Tensor,
        **options: Any,
    ) -> Any:
        raise NotImplementedError("A preference loss defines preference_loss_fn.")

    @staticmethod
    def forward(
        cls: Any,
        ctx: Any,
        _input: Tensor,
        weight: Tensor,
        target: Tensor,
        preference_labels: Tensor,
        bias: Tensor | None = None,
        chunk_size: int = 1,
        ignore_index: int = -100,
        compiled: bool = True,
        use_ref_model: bool = False,
        ref_input: Tensor | None = None,
        ref_weight: Tensor | None = None,
        ref_bias: Tensor | None = None,
        average_log_prob: bool = False,
        **loss_kwargs: Any,
    ) -> LossAndMetrics:
        """The loss, and (chosen_logps_sum, rejected_logps_sum, chosen_logits_sum, rejected_logits_sum, and metrics),
        all 0-d. `compiled` and `chunk_size` are accepted, without effect.

        _input: (B, T, H). weight: (V, H). target: (B, T). preference_labels: (B,), True where desirable.
        """
        check_chunk_size(chunk_size)

        def of_sequences(
            logps: Tensor, desirable: Tensor, ref_logps: Tensor | None, empty: Tensor
        ) -> tuple[Tensor, list[Tensor]]:
            more = {"ref_log_prob_chunk": ref_logps} if use_ref_model else {}
            found = cls.preference_loss_fn(logps, desirable, target, **more, **loss_kwargs)
            loss, *metrics = found if isinstance(found, tuple) else (found,)
            return loss, [metric.sum() for metric in metrics]

        def loss_of(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> LossAndMetrics:
            return unpaired_loss(
                of_sequences, hidden, weight, target, bias, preference_labels,
                reference=reference_of(use_ref_model, ref_input, ref_weight, ref_bias),
                ignore_index=ignore_index, average_log_prob=average_log_prob,
            )  # fmt: skip

        return GradientsInForward.keep(ctx, loss_of, _input, weight, bias)

    @staticmethod
    def backward(ctx: Any, *grad_output: Any) -> tuple[Tensor | None, ...]:
        """Gradients of _input and weight, twice None, and that of bias; given that of the loss, or the whole tuple."""
        grad = grad_output[0]
        grad = grad[0] if isinstance(grad, tuple) else grad
        dx, dw, db = GradientsInForward.handed_out(ctx, grad)
        return dx, dw, None, None, db
