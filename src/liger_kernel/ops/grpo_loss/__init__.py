"""The GRPO family of losses (arXiv 2402.03300 and its relatives) of given logits, and log-probabilities of tokens.

The logits are read once. Backward reads them again and needs no softmax that was kept; a loss that is summed right away
is differentiated in the same walk, while its row is in the cache.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from liger_kernel._core.autograd import (
    Op,
    graph_is_kept,
    is_transformed,
    made_in_forward,
    refuse_double_backward,
)
from liger_kernel._core.checks import check_floating, check_same_device
from liger_kernel._core.lazy import compat_names
from liger_kernel.backends import can_look
from liger_kernel.backends.dispatch import Dispatch, no_shards
from liger_kernel.ops import OPS
from liger_kernel.ops.cross_entropy import check_class_indices, only_loss_has_gradient
from liger_kernel.ops.grpo_loss import reference
from liger_kernel.ops.grpo_loss.contract import NOT_COUNTED, GRPOLossOptions
from liger_kernel.ops.scale_gradients import scale_gradients

Outputs = tuple[Tensor, Tensor | None, Tensor | None]


class _GRPOLoss(Op):
    @staticmethod
    def forward(ctx: Any, impl: Any, options: Any, *tensors: Any) -> Outputs:
        needs = ctx.needs_input_grad[2:]
        outputs, saved = impl.forward(*tensors, options=options, needs=needs)
        only_loss_has_gradient(ctx, outputs)
        if needs[0]:
            ctx.save_for_backward(*saved)
            ctx.of_forward = impl, options, needs
        return outputs

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        refuse_double_backward()
        impl, options, needs = ctx.of_forward
        if grads[0] is None:
            return (None,) * (2 + len(needs))
        if len(ctx.saved_tensors) == 1:
            found = made_in_forward(ctx)
            scale_gradients(found, grads[0])
            return None, None, *found, *(None,) * (len(needs) - 1)
        if options.in_place and graph_is_kept():
            raise RuntimeError(
                "grpo_loss(in_place=True) overwrites its logits in backward, which retain_graph=True would read again; "
                "pass in_place=False."
            )
        return None, None, *impl.backward(grads, ctx.saved_tensors, options=options, needs=needs)


_dispatch = Dispatch(
    "grpo_loss",
    _GRPOLoss,
    reference.grpo_loss,
    shards=no_shards("grpo_loss", "pass logits.full_tensor(), or the rows of this rank"),
)


def grpo_loss(
    logits: Tensor,
    token_ids: Tensor,
    old_logps: Tensor | None = None,
    ref_logps: Tensor | None = None,
    advantages: Tensor | None = None,
    weight: Tensor | None = None,
    sum_weight: Tensor | None = None,
    **options: Any,
) -> Outputs:
    """Losses of sampled tokens, from the logits that they were, or might have been, sampled from.

    Args:
        logits: (R, V), any floating dtype, any strides. Only they get a gradient.
        token_ids: (R,) integers, the sampled classes; a token -1 counts for nothing, and its row is not read.
        old_logps, ref_logps: (R,) log-probabilities of the sampler and of the reference model; None: the model's own.
        advantages: (R,). weight: (R,), a factor of the loss without its KL divergence. A packed batch is R tokens.
        sum_weight: (R,); the loss is then 0-d, the sum of those of the tokens times these, and its gradient is made in
            forward, unless `in_place`.
        options: those of `GRPOLossOptions`. loss_type: grpo, cispo, sapo, vespo (whose weight is its phi), or a name
            of grpo with another reduction; "logps": log-probabilities in place of losses, which need no advantages.
            temperature: the logits are divided by it. beta: of the KL divergence. epsilon_low, epsilon_high, delta,
            sapo_temperature_pos, sapo_temperature_neg, use_bias_correction_kl: as in `LigerFusedLinearGRPOLoss`.
            in_place: backward writes the gradient over the logits, if they are contiguous and nobody else's backward
            needs them: autograd raises if one does.

    Returns: losses, KL divergences (None with beta 0) and whether the ratio was clipped (1 or 0), all (R,), at least
        fp32; only the loss carries a gradient. A ratio of more than e^80 counts as e^80.
    Raises: ValueError and TypeError for arguments that do not fit; IndexError for an id out of range on the CPU,
        elsewhere it gives NaN.
    """
    chosen = GRPOLossOptions(**options)
    given = {
        "old_logps": old_logps,
        "ref_logps": ref_logps,
        "advantages": advantages,
        "weight": weight,
        "sum_weight": sum_weight,
    }
    check_floating(logits=logits, **given)
    if logits.ndim != 2:
        raise ValueError(f"logits have shape {tuple(logits.shape)}, not (R, V); flatten them.")
    for name, t in (("token_ids", token_ids), *given.items()):
        if t is not None and t.shape != logits.shape[:1]:
            raise ValueError(
                f"{name} has shape {tuple(t.shape)}, but there are {logits.shape[0]} rows of logits; "
                f"pass ({logits.shape[0]},)."
            )
    check_class_indices(token_ids)
    check_same_device(logits=logits, token_ids=token_ids, **given)
    if advantages is None and chosen.loss_type != "logps":
        raise ValueError(f"loss_type={chosen.loss_type!r} needs advantages, got None.")
    token_ids = token_ids.to(torch.int64)
    if not is_transformed():
        if can_look(token_ids):
            wrong = (token_ids >= logits.shape[1]) | (token_ids < NOT_COUNTED)
            if wrong.any():
                raise IndexError(
                    f"token {int(token_ids[wrong][0])} is out of bounds for {logits.shape[1]} classes."
                )
        if not torch.is_grad_enabled():
            logits = logits.detach()  # `needs_input_grad` does not know about no_grad
    constants = (None if t is None else t.detach() for t in given.values())
    found: Outputs = _dispatch(chosen, logits, token_ids, *constants)
    return found


__getattr__ = compat_names(__name__, OPS["grpo_loss"])
