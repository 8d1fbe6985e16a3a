"""From hidden states to log-probabilities of tokens and sequences, with memory for one chunk of logits.

All losses on log-probabilities stand on these functions; the loss head sizes the chunks, runs the matrix products and
computes gradients only for tensors that require one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from liger_kernel.loss_head.label_count import LabelCount
from liger_kernel.loss_head.linear_logprobs import linear_logprobs, linear_logprobs_loss
from liger_kernel.loss_head.node import check_tensors

#: (hidden, weight, bias) of a frozen reference model
Reference = tuple[Tensor, Tensor, Tensor | None]
#: the log-probabilities of all tokens (B, T) -> the loss, and what is returned beside it, without gradient
LossOfLogps = Callable[[Tensor], tuple[Tensor, Sequence[Tensor]]]


def token_logps(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    temperature: float = 1.0,
    label_count: LabelCount | None = None,
) -> Tensor:
    """log softmax((hidden @ weight.T + bias) / temperature) at `target`, 0 where that is `ignore_index`.

    hidden: (B, T, H). weight: (V, H). target: (B, T). bias: (V,). Returns (B, T), at least fp32.
    """
    return linear_logprobs(
        hidden,
        weight,
        target,
        bias=bias,
        temperature=temperature,
        ignore_index=ignore_index,
        label_count=label_count,
    ).log_prob


def loss_of_logps(
    loss_fn: LossOfLogps,
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    temperature: float = 1.0,
    *,
    group_size: int,
    order: Tensor | None = None,
    label_count: LabelCount | None = None,
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """`loss_fn` of the `token_logps` of these arguments: see `linear_logprobs_loss`."""
    return linear_logprobs_loss(
        lambda found: loss_fn(found.log_prob),
        hidden,
        weight,
        target,
        bias=bias,
        ignore_index=ignore_index,
        temperature=temperature,
        group_size=group_size,
        order=order,
        label_count=label_count,
    )


@torch.no_grad()
def reference_token_logps(
    reference: Reference,
    target: Tensor,
    ignore_index: int = -100,
    temperature: float = 1.0,
    label_count: LabelCount | None = None,
) -> Tensor:
    hidden, weight, bias = reference
    return token_logps(hidden, weight, target, bias, ignore_index, temperature, label_count)


def sequence_logps(logps: Tensor, labelled: Tensor, average: bool) -> Tensor:
    """(B, T) -> (B,): the sum over a sequence, or the mean over its labelled tokens; 0 where there are none."""
    total = logps.sum(1)
    return total / labelled.sum(1).clamp(min=1) if average else total


@torch.no_grad()
def sequence_logit_sums(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """(B,): all logits of a sequence added up, which needs the logits of no token."""
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    total = (hidden.sum(1, dtype=dtype) * weight.sum(0, dtype=dtype)).sum(1)
    return total if bias is None else total + hidden.shape[1] * bias.sum(dtype=dtype)


def reference_of(
    use_ref_model: bool,
    ref_input: Tensor | None,
    ref_weight: Tensor | None,
    ref_bias: Tensor | None,
) -> Reference | None:
    if not use_ref_model:
        return None
    if ref_input is None or ref_weight is None:
        missing = "ref_input" if ref_input is None else "ref_weight"
        raise ValueError(
            f"use_ref_model=True, but {missing} is None; pass ref_input and ref_weight, or use_ref_model=False."
        )
    return ref_input, ref_weight, ref_bias


def check_sequences(hidden: Tensor, target: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    if hidden.ndim != 3 or target.shape != hidden.shape[:2]:
        raise ValueError(
            f"hidden states have shape {tuple(hidden.shape)} and labels {tuple(target.shape)}, "
            f"not (B, T, H) and (B, T)."
        )
    check_tensors(hidden.flatten(0, 1), weight, target.flatten(), bias)


def of_sequences_or_tokens(name: str, values: Tensor, tokens: Tensor) -> Tensor:
    """(B,), (B, 1) or (B, T) as (B, 1) or (B, T), constants; `tokens` are (B, T)."""
    batch, length = tokens.shape
    found = values.unsqueeze(1) if values.ndim == 1 else values
    if tuple(found.shape) not in ((batch, 1), (batch, length)):
        raise ValueError(
            f"{name} has shape {tuple(values.shape)}; pass ({batch},), ({batch}, 1) or ({batch}, {length})."
        )
    return found.detach()
