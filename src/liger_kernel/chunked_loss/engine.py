"""From hidden states to log-probabilities of tokens and sequences, with memory for one chunk of logits.

All losses on log-probabilities stand on these functions; the loss head sizes the chunks, runs the matrix products and
computes gradients only for tensors that require one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from liger_kernel._core.autograd import is_transformed
from liger_kernel.loss_head.groups import RowGroups
from liger_kernel.loss_head.linear_logprobs import linear_logprobs
from liger_kernel.loss_head.losses.logprobs import LogProbsLoss
from liger_kernel.loss_head.node import check_tensors, compute_dtype, linear_loss
from liger_kernel.loss_head.plan import ChunkOptions, ChunkPlan

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
) -> Tensor:
    """log softmax((hidden @ weight.T + bias) / temperature) at `target`, 0 where that is `ignore_index`.

    hidden: (B, T, H). weight: (V, H). target: (B, T). bias: (V,). Returns (B, T), at least fp32.
    """
    return linear_logprobs(
        hidden, weight, target, bias=bias, temperature=temperature, ignore_index=ignore_index
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
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """`loss_fn` of the `token_logps` of these arguments, with the logits made once where that is possible.

    The loss must be a sum over groups of `group_size` tokens each, no term of which reads the log-probability of a
    token of another group; `order` (B * T,) lists the tokens group by group, None: they are so already. `loss_fn` is
    called for every chunk, with arbitrary numbers for the tokens of others. What it gives beside the loss has no
    gradient.

    The logits are made a second time, in backward, where a group exceeds two chunks (`loss_head.plan`), under
    torch.compile and other transforms, and in float16, whose gradient scaler would come too late.
    """
    needs = [
        torch.is_grad_enabled() and t is not None and t.requires_grad
        for t in (hidden, weight, bias)
    ]
    if any(needs) and target.numel() and not is_transformed():
        flat, labels = hidden.reshape(-1, hidden.shape[-1]), target.reshape(-1)
        check_tensors(flat, weight, labels, bias)
        dtype = compute_dtype(flat, weight)
        plan = ChunkPlan.of(labels.numel(), weight, dtype, ChunkOptions(), needs[1])
        if dtype != torch.float16 and group_size <= 2 * plan.rows:
            wide = torch.promote_types(dtype, torch.float32)
            # a log-probability at which every loss is smooth: that of 0 is a singular point of the odds ratio
            neutral = -(labels != ignore_index).to(wide)[:, None]
            of_rows = LogProbsLoss(ignore_index, temperature)
            groups = RowGroups(group_size, order, lambda x: loss_fn(x.view(target.shape)), neutral)
            loss, *reported = linear_loss(of_rows, flat, weight, labels, bias, groups=groups)
            return loss, tuple(reported)
    loss, found = loss_fn(token_logps(hidden, weight, target, bias, ignore_index, temperature))
    return loss, tuple(t.detach() for t in found)


@torch.no_grad()
def reference_token_logps(
    reference: Reference, target: Tensor, ignore_index: int = -100, temperature: float = 1.0
) -> Tensor:
    hidden, weight, bias = reference
    return token_logps(hidden, weight, target, bias, ignore_index, temperature)


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


def check_sequences(hidden: Tensor, target: Tensor) -> None:
    if hidden.ndim != 3 or target.shape != hidden.shape[:2]:
        raise ValueError(
            f"hidden states have shape {tuple(hidden.shape)} and labels {tuple(target.shape)}, "
            f"not (B, T, H) and (B, T)."
        )
