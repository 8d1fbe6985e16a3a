"""The base of preference losses that other projects write: on `paired_loss`, in the call forms of the incumbent."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from liger_kernel.chunked_loss.engine import reference_of
from liger_kernel.chunked_loss.gradients import GradientsInForward
from liger_kernel.chunked_loss.options import check_chunk_size
from liger_kernel.chunked_loss.preference import LossAndMetrics, paired_loss


class LigerFusedLinearPreferenceBase(GradientsInForward):
    """alpha * NLL of the chosen tokens + `preference_loss_fn`; the first half of a batch is chosen, the rest rejected.

    A subclass gives `preference_loss_fn(chosen_logps, rejected_logps, full_target, ref_chosen_logps=,
    ref_rejected_logps=, beta=, ...)`: the sum over the pairs, divided by half the sequences of `full_target`; or a
    tuple of that and of metrics, each a tensor of the pairs or 0-d. It is called with one pair at a time.
    """

    @staticmethod
    def preference_loss_fn(
        chosen_logps: Tensor, rejected_logps: Tensor, full_target: Tensor, **options: Any
    ) -> Any:
        raise NotImplementedError("A preference loss defines preference_loss_fn.")

    @staticmethod
    def forward(
        cls: Any,
        ctx: Any,
        _input: Tensor,
        weight: Tensor,
        target: Tensor,
        bias: Tensor | None = None,
        chunk_size: int = 1,
        ignore_index: int = -100,
        alpha: float = 1.0,
        beta: float = 0.1,
        compute_nll_loss: bool = True,
        nll_target: Tensor | None = None,
        compiled: bool = True,
        use_ref_model: bool = False,
        ref_input: Tensor | None = None,
        ref_weight: Tensor | None = None,
        ref_bias: Tensor | None = None,
        average_log_prob: bool = True,
        **loss_kwargs: Any,
    ) -> LossAndMetrics:
        """The loss, and (chosen_logps (P,), rejected_logps (P,), chosen_logits_mean, rejected_logits_mean, nll_loss,
        and the metrics, (P,), or 0-d where they were). `compiled` and `chunk_size` are accepted, without effect.

        _input: (2P, T, H). weight: (V, H). target, nll_target: (2P, T). The other two of the reference model: as these.
        """
        check_chunk_size(chunk_size)
        pairs = target.shape[0] // 2
        scalar: list[bool] = []  # of the loss and its metrics: is it 0-d?

        def of_pair(i: int, *logps: Tensor) -> list[Tensor]:
            more = dict(zip(("ref_chosen_logps", "ref_rejected_logps"), logps[2:], strict=True))
            found = cls.preference_loss_fn(
                *logps[:2],
                target[[i, pairs + i]],
                beta=beta,
                **(more if use_ref_model else {}),
                **loss_kwargs,
            )
            values = found if isinstance(found, tuple) else (found,)
            scalar[:] = [value.ndim == 0 for value in values]
            return [value.reshape(()) for value in values]

        def of_pairs(*sides: Tensor) -> tuple[Tensor, ...]:
            of_each = [of_pair(i, *(side[i : i + 1] for side in sides)) for i in range(pairs)]
            # without a pair there is a loss, and no metric
            return tuple(map(torch.stack, zip(*of_each, strict=True))) or sides[:1]

        def loss_of(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> LossAndMetrics:
            return paired_loss(
                of_pairs,
                hidden,
                weight,
                target,
                bias,
                reference=reference_of(use_ref_model, ref_input, ref_weight, ref_bias),
                ignore_index=ignore_index,
                alpha=alpha,
                compute_nll_loss=compute_nll_loss,
                nll_target=nll_target,
                average_log_prob=average_log_prob,
            )

        loss, metrics = GradientsInForward.keep(ctx, loss_of, _input, weight, bias)
        own = zip(metrics[5:], scalar[1:], strict=True)
        return loss, (*metrics[:5], *(m.sum() / max(pairs, 1) if one else m for m, one in own))

    @staticmethod
    def backward(ctx: Any, *grad_output: Any) -> tuple[Tensor | None, ...]:
        """Gradients of _input and weight, None, and that of bias; given that of the loss, or the whole tuple."""
        grad = grad_output[0]
        dx, dw, db = GradientsInForward.handed_out(
            ctx, grad[0] if isinstance(grad, tuple) else grad
        )
        return dx, dw, None, db
