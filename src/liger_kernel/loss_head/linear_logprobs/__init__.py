"""The last linear layer of a language model, and log-probabilities under its softmax, without ever holding all logits.

What policy-gradient trainers and distillation build on: the log-probability of each token, the entropy of its
distribution, and more, each with its gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from liger_kernel._core.autograd import is_transformed
from liger_kernel._core.lazy import compat_names
from liger_kernel.loss_head.groups import RowGroups
from liger_kernel.loss_head.label_count import LabelCount
from liger_kernel.loss_head.losses.logprobs import LogProbsLoss
from liger_kernel.loss_head.node import check_tensors, compute_dtype, linear_loss
from liger_kernel.loss_head.plan import ChunkOptions, ChunkPlan
from liger_kernel.ops import LINEAR_LOSSES, SHARDED_LOSSES
from liger_kernel.ops.logprobs import checked, named, split_temperature
from liger_kernel.ops.logprobs.contract import LogProbs


def linear_logprobs(
    hidden: Tensor,
    weight: Tensor,
    ids: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    scale: float = 1.0,
    entropy: bool = False,
    logsumexp: bool = False,
    sum_p2: bool = False,
    mean_logit: bool = False,
    top1: bool = False,
    top_k: int = 0,
    ignore_index: int = -100,
    accum_dtype: torch.dtype | None = None,
    chunk_size: int | None = None,
    memory_budget: int | None = None,
    label_count: LabelCount | int | None = None,
) -> LogProbs:
    """The log-probability of each token under `softmax(z)`, where z are the scaled logits `hidden @ weight.T + bias`.

    Args:
        hidden: (..., H), any strides. weight: (V, H) in the same dtype. bias: (V,). ids: (...) integers, of the tokens.
        temperature, softcap, scale, ignore_index, entropy, logsumexp, sum_p2, mean_logit, top1, top_k: as in
            `liger_kernel.ops.logprobs.logprobs`; z = softcap tanh(scale logits / softcap) / temperature.
        accum_dtype, chunk_size, memory_budget, label_count: as in `fused_linear_cross_entropy`.

    Returns: `LogProbs`, at least fp32: what was asked for, None for the rest. The first five carry gradients.
    Ignored tokens cost nothing where their number is known: on the CPU, and by `label_count`. The logits of up to
    2 H tokens are made once and stay for backward, in no more memory than it needs anyway, if the weight, which needs a
    gradient, has the dtype of the products, and neither `top_k` nor a size of chunks is asked for. Otherwise backward
    makes them again, chunk by chunk.
    Raises: as `logprobs`; TypeError if hidden and weight differ in dtype; ValueError for shapes that do not fit.
    """
    if hidden.ndim == 0 or ids.shape != hidden.shape[:-1]:
        raise ValueError(
            f"hidden has shape {tuple(hidden.shape)} and ids {tuple(ids.shape)}, not (..., H) and (...)."
        )
    number, of_rows = split_temperature(temperature, ids, ignore_index)
    loss = LogProbsLoss(
        ignore_index, number, softcap, scale, entropy, logsumexp, sum_p2, mean_logit, top1, top_k
    )
    checked(loss, weight.shape[0])
    found: Any = linear_loss(
        loss,
        hidden.reshape(-1, hidden.shape[-1]),
        weight,
        ids.reshape(-1),
        bias,
        class_weight=of_rows,
        chunks=ChunkOptions(accum_dtype, chunk_size, memory_budget, label_count),
    )
    return named(found, loss, ids.shape)


def linear_logprobs_loss(
    loss_of: Callable[[LogProbs], tuple[Tensor, Sequence[Tensor]]],
    hidden: Tensor,
    weight: Tensor,
    ids: Tensor,
    *,
    group_size: int = 1,
    order: Tensor | None = None,
    label_count: LabelCount | None = None,
    **options: Any,
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """`loss_of` of the `linear_logprobs` of these arguments, with the logits made once where that is possible.

    Args:
        loss_of: from the numbers of all tokens to the loss, and what is reported beside it, without gradient. The loss
            is a sum over groups, no term of which reads a token of another group. It is called for every chunk, with
            arbitrary numbers for the tokens of others. No other tensor that it reads gets a gradient.
        group_size: tokens of a group; with 1, a token stands for itself. order: (ids.numel(),) the tokens group by
            group; None: they are so already.
        label_count: `count_labels` of the ids in these groups. Where it is None ignored tokens on a GPU cost as others.
        options: of `linear_logprobs`, but the largest classes and how the work is done.

    The logits are made a second time, in backward, where a group exceeds two chunks (`loss_head.plan`), under
    torch.compile and other transforms, and in float16, whose gradient scaler would come too late.
    Raises: as `linear_logprobs`; ValueError for a `loss_of` that reads a tensor that requires a gradient.
    """
    own = {**options, "temperature": 1.0}
    bias = own.pop("bias", None)
    ignored = LogProbsLoss(**own).ignore_index
    number, of_rows = split_temperature(options.get("temperature", 1.0), ids, ignored)
    # torch.compile of 2.6 does not trace dataclasses.replace
    loss = checked(LogProbsLoss(**{**own, "temperature": number}), weight.shape[0])
    _check_groups(ids, group_size, order)
    if loss.top1 or loss.top_k:
        raise ValueError(
            f"top1={loss.top1} and top_k={loss.top_k} are nothing that a loss depends on; ask linear_logprobs."
        )
    flat, labels = hidden.reshape(-1, hidden.shape[-1]), ids.reshape(-1)
    inputs = (hidden, weight, bias)
    needs = [torch.is_grad_enabled() and t is not None and t.requires_grad for t in inputs]
    if any(needs) and ids.numel() and not is_transformed():
        check_tensors(flat, weight, labels, bias)
        dtype = compute_dtype(flat, weight)
        plan = ChunkPlan.of(labels.numel(), weight, dtype, ChunkOptions(), needs[1])
        if dtype != torch.float16 and group_size <= 2 * plan.rows:
            wide = torch.promote_types(dtype, torch.float32)
            # numbers at which every loss is smooth: a log-probability of 0 is a singular point of the odds ratio
            neutral = torch.ones(labels.numel(), len(loss.numbers), dtype=wide, device=ids.device)
            neutral[:, 0] = -1
            neutral.masked_fill_((labels == loss.ignore_index)[:, None], 0)

            def of_numbers(numbers: Tensor) -> tuple[Tensor, Sequence[Tensor]]:
                return _loss_and_reported(
                    loss_of, named((numbers, None, None, None), loss, ids.shape)
                )

            groups = RowGroups(group_size, order, of_numbers, neutral)
            chunks = ChunkOptions(label_count=label_count)
            value, *beside = linear_loss(
                loss, flat, weight, labels, bias, class_weight=of_rows, chunks=chunks, groups=groups
            )
            return value, tuple(beside)
    found = linear_logprobs(hidden, weight, ids, label_count=label_count, **options)
    value, reported = _loss_and_reported(loss_of, found)
    return value, tuple(t.detach() for t in reported)


def _loss_and_reported(loss_of: Any, found: LogProbs) -> tuple[Tensor, Sequence[Tensor]]:
    said = loss_of(found)
    pair = isinstance(said, tuple) and len(said) == 2
    if not pair or not isinstance(said[0], Tensor) or said[0].ndim:
        raise TypeError(
            f"loss_of returned {said!r:.60}, not a loss of shape () and a sequence of what is reported beside it; "
            f"return (loss, ()) where there is nothing."
        )
    return said


def _check_groups(ids: Tensor, group_size: int, order: Tensor | None) -> None:
    tokens = ids.numel()
    if group_size < 0 or tokens % max(group_size, 1) or (tokens and not group_size):
        raise ValueError(
            f"group_size={group_size} does not part {tokens} tokens; pass 1, or a divisor of their number."
        )
    if order is not None and order.shape != (tokens,):
        raise ValueError(
            f"order has shape {tuple(order.shape)}; pass each of the {tokens} tokens once, ({tokens},)."
        )


_NAMES = (*LINEAR_LOSSES["linear_logprobs"], *SHARDED_LOSSES["vocab_parallel_logprobs"])
__getattr__ = compat_names(__name__, _NAMES)
