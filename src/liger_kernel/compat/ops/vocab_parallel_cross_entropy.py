"""Vocabulary-parallel cross entropy under the incumbent's names."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from liger_kernel.compat.function import autograd_function
from liger_kernel.compat.ops_utils import MAX_FUSED_SIZE
from liger_kernel.distributed.vocab_parallel_cross_entropy import (
    validate_formula_and_mode,
    vocab_parallel_cross_entropy,
)

__all__ = ["MAX_FUSED_SIZE", "LigerVocabParallelCEFunction", "validate_formula_and_mode"]


def _by_sequence(
    vocab_parallel_logits: Tensor,
    target: Tensor,
    tp_group: Any,
    ignore_index: int,
    label_smoothing: float,
    label_smoothing_formula: str,
    label_smoothing_mode: str,
) -> Tensor:
    """The loss of each token, (S, B) in fp32, of logits (S, B, classes of this rank), as Megatron has them.

    Every rank of `tp_group` holds as many classes. Smoothed are the labels over all classes ("global") or over those of
    the rank ("partition"), K of them; by the "megatron" formula with `label_smoothing` K / (K - 1).
    """
    logits = vocab_parallel_logits
    if logits.ndim != 3:
        raise ValueError(f"vocab_parallel_logits must be 3-D (S, B, V), got {tuple(logits.shape)}.")
    validate_formula_and_mode(label_smoothing_formula, label_smoothing_mode)
    group = tp_group if tp_group is not None and hasattr(tp_group, "size") else None
    here = label_smoothing_mode == "partition"
    if label_smoothing_formula == "megatron":
        n = logits.shape[-1] * (1 if here or group is None else group.size())
        label_smoothing *= n / max(1, n - 1)
    loss = vocab_parallel_cross_entropy(
        logits.flatten(0, 1),
        target.flatten(),
        group,
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
        reduction="none",
        smooths_here=here,
    )[0]
    return loss.view(target.shape)


LigerVocabParallelCEFunction = autograd_function("LigerVocabParallelCEFunction", _by_sequence)
