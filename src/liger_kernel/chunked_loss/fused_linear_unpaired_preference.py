"""The base of losses on single sequences, desirable or not, that other projects write: on `unpaired_loss`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from liger_kernel.chunked_loss.engine import reference_of
from liger_kernel.chunked_loss.gradients import GradientsInForward
from liger_kernel.chunked_loss.options import check_chunk_size
from liger_kernel.chunked_loss.preference import LossAndMetrics, unpaired_loss


class LigerFusedLinearUnpairedPreferenceBase(GradientsInForward):
    """The mean of `preference_loss_fn` over sequences, each labelled desirable or not.

    A subclass gives `preference_loss_fn(log_prob_chunk, preference_labels_chunk, full_target, ref_log_prob_chunk=,
    ...)`: the sum over the sequences, divided by those of `full_target`; or a tuple of that and of 0-d metrics, which
    are added up. It is called with one sequence at a time.
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
        """The loss, and (chosen_logps_sum, rejected_logps_sum, chosen_logits_sum, rejected_logits_sum, and the sums of
        the metrics), all 0-d. `compiled` and `chunk_size` are accepted, without effect.

        _input: (B, T, H). weight: (V, H). target: (B, T). preference_labels: (B,), True where desirable.
        """
        check_chunk_size(chunk_size)

        def of_sequence(i: int, logps: Tensor, ref_logps: Tensor | None) -> list[Tensor]:
            at = slice(i, i + 1)
            more = {} if ref_logps is None else {"ref_log_prob_chunk": ref_logps[at]}
            found = cls.preference_loss_fn(
                logps[at], preference_labels[at], target[at], **more, **loss_kwargs
            )
            return [v.reshape(()) for v in (found if isinstance(found, tuple) else (found,))]

        def of_sequences(logps: Tensor, ref_logps: Tensor | None) -> tuple[Tensor, ...]:
            of_each = [of_sequence(i, logps, ref_logps) for i in range(target.shape[0])]
            # without a sequence there is a loss, and no metric
            return tuple(map(torch.stack, zip(*of_each, strict=True))) or (logps,)

        def loss_of(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> LossAndMetrics:
            loss, sums, metrics = unpaired_loss(
                of_sequences,
                *(hidden, weight, target, preference_labels, bias),
                reference=reference_of(use_ref_model, ref_input, ref_weight, ref_bias),
                ignore_index=ignore_index,
                average_log_prob=average_log_prob,
            )
            return loss, (*sums, *(metric.sum() for metric in metrics))

        return GradientsInForward.keep(ctx, loss_of, _input, weight, bias)

    @staticmethod
    def backward(ctx: Any, *grad_output: Any) -> tuple[Tensor | None, ...]:
        """Gradients of _input and weight, None twice, and that of bias; given that of the loss, or the whole tuple."""
        grad = grad_output[0]
        dx, dw, db = GradientsInForward.handed_out(
            ctx, grad[0] if isinstance(grad, tuple) else grad
        )
        return dx, dw, None, None, db
