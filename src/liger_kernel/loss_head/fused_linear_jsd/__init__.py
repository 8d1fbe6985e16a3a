"""Two linear layers and the Jensen-Shannon divergence of their softmaxes in one, without ever holding all logits."""

from __future__ import annotations

import torch
from torch import Tensor

from liger_kernel._core.lazy import compat_names
from liger_kernel.loss_head.label_count import LabelCount
from liger_kernel.loss_head.losses.distillation import counted_rows
from liger_kernel.loss_head.losses.jsd import JSDLoss
from liger_kernel.loss_head.node import linear_loss
from liger_kernel.loss_head.plan import ChunkOptions
from liger_kernel.ops import LINEAR_LOSSES


def fused_linear_jsd(
    student_input: Tensor,
    student_weight: Tensor,
    teacher_input: Tensor,
    teacher_weight: Tensor | None,
    shift_labels: Tensor | None = None,
    jsd_beta: float = 0.5,
    ignore_index: int = -100,
    temperature: float = 1.0,
    accum_dtype: torch.dtype | None = None,
    chunk_size: int | None = None,
    memory_budget: int | None = None,
    label_count: LabelCount | int | None = None,
) -> Tensor:
    """beta KL(p || m) + (1 - beta) KL(q || m), m = beta p + (1 - beta) q, of the softmaxes q of the student and p of
    the teacher, whose logits are both divided by the temperature: the mean over the rows.

    Args:
        student_input: (N, Hs), any strides. student_weight: (V, Hs) in the same dtype.
        teacher_input: (N, Ht). teacher_weight: (Vt, Ht); None: `teacher_input` are the teacher's logits (N, Vt). Both
            are constants. A class that only one of the two models has, which are the last ones of the larger
            vocabulary, counts as a logit of 0 of the other.
        shift_labels: (N,) integers; a row whose label is `ignore_index` counts for nothing.
        jsd_beta: 0 is KL(p || q), the forward KL divergence, and 1 the reverse, KL(q || p).
        accum_dtype, chunk_size, memory_budget, label_count: as in `fused_linear_cross_entropy`.

    Returns: 0-d, at least fp32; 0 where no row counts. The loss is not multiplied by the square of the temperature.
    Raises: ValueError and TypeError for arguments that do not fit.
    """
    loss = JSDLoss(
        ignore_index,
        hard_weight=0.0,
        soft_weight=1.0,
        temperature=temperature,
        hard=False,
        beta=jsd_beta,
    )
    target = counted_rows(shift_labels, student_input, student_weight, ignore_index)
    chunks = ChunkOptions(accum_dtype, chunk_size, memory_budget, label_count)
    teacher = (teacher_input, teacher_weight, None)
    found: Tensor = linear_loss(
        loss, student_input, student_weight, target, teacher=teacher, chunks=chunks
    )[0]
    return found


__getattr__ = compat_names(__name__, LINEAR_LOSSES["fused_linear_jsd"])
