"""A linear layer and the KL divergence from given probabilities to its softmax, without ever holding all logits."""

from __future__ import annotations

import torch
from torch import Tensor

from liger_kernel._core.checks import check_choice
from liger_kernel._core.lazy import compat_names
from liger_kernel.loss_head.label_count import LabelCount
from liger_kernel.loss_head.losses.distillation import counted_rows
from liger_kernel.loss_head.losses.kl_div import KLDivLoss
from liger_kernel.loss_head.node import linear_loss
from liger_kernel.loss_head.plan import ChunkOptions
from liger_kernel.ops import LINEAR_LOSSES

REDUCTIONS = ("batchmean", "mean", "sum")


def fused_linear_kl_div(
    student_input: Tensor,
    student_weight: Tensor,
    target: Tensor,
    shift_labels: Tensor | None = None,
    reduction: str = "batchmean",
    ignore_index: int = -100,
    temperature: float = 1.0,
    eps: float = 1e-10,
    accum_dtype: torch.dtype | None = None,
    chunk_size: int | None = None,
    memory_budget: int | None = None,
    label_count: LabelCount | int | None = None,
) -> Tensor:
    """sum p (log max(p, eps) - log q), q the softmax of `student_input @ student_weight.T / temperature`.

    Args:
        student_input: (N, H), any strides. student_weight: (V, H) in the same dtype.
        target: (N, V), p: probabilities in any floating dtype, constants.
        shift_labels: (N,) integers; a row whose label is `ignore_index` counts for nothing.
        reduction: "batchmean" divides by the number of rows that count, "mean" by that of their classes.
        accum_dtype, chunk_size, memory_budget, label_count: as in `fused_linear_cross_entropy`.

    Returns: 0-d, at least fp32; 0 where no row counts.
    Raises: ValueError and TypeError for arguments that do not fit, reduction "none" among them.
    """
    check_choice("reduction", reduction, REDUCTIONS)
    classes = student_weight.shape[0]
    if target.ndim != 2 or target.shape[1] != classes:
        raise ValueError(
            f"target has shape {tuple(target.shape)}, but there are {classes} classes; pass (N, {classes})."
        )
    loss = KLDivLoss(
        ignore_index,
        "sum" if reduction == "sum" else "mean",
        hard_weight=0.0,
        soft_weight=1.0,
        temperature=temperature,
        hard=False,
        eps=eps,
        divisor_of_mean=classes if reduction == "mean" else 1,
    )
    labels = counted_rows(shift_labels, student_input, student_weight, ignore_index)
    chunks = ChunkOptions(accum_dtype, chunk_size, memory_budget, label_count)
    found: Tensor = linear_loss(
        loss, student_input, student_weight, labels, teacher=(target, None, None), chunks=chunks
    )[0]
    return found


__getattr__ = compat_names(__name__, LINEAR_LOSSES["fused_linear_kl_div"])
