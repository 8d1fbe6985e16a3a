"""The last linear layer of a language model, and log-probabilities under its softmax, without ever holding all logits.

What policy-gradient trainers and distillation build on: the log-probability of each token, the entropy of its
distribution, and more, each with its gradient.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from liger_kernel._core.lazy import compat_names
from liger_kernel.loss_head.label_count import LabelCount
from liger_kernel.loss_head.losses.logprobs import LogProbsLoss
from liger_kernel.loss_head.node import linear_loss
from liger_kernel.loss_head.plan import ChunkOptions
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
    Ignored tokens cost nothing where their number is known: on the CPU, and by `label_count`. Backward makes the logits
    again, chunk by chunk, since it has to know the gradient of each token.
    Raises: as `logprobs`; TypeError if hidden and weight differ in dtype; ValueError for shapes that do not fit.
    """
    if hidden.ndim == 0 or ids.shape != hidden.shape[:-1]:
        raise ValueError(
            f"hidden has shape {tuple(hidden.shape)} and ids {tuple(ids.shape)}, not (..., H) and (...)."
        )
    number, of_rows = split_temperature(temperature, ids)
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


_NAMES = (*LINEAR_LOSSES["linear_logprobs"], *SHARDED_LOSSES["vocab_parallel_logprobs"])
__getattr__ = compat_names(__name__, _NAMES)
