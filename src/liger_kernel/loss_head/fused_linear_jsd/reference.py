"""Two linear layers and the JSD of their softmaxes with all logits in memory: the specification."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from liger_kernel.ops.jsd.reference import jsd


def fused_linear_jsd(
    student_input: Tensor,
    student_weight: Tensor,
    teacher_input: Tensor,
    teacher_weight: Tensor | None,
    shift_labels: Tensor | None = None,
    *,
    jsd_beta: float = 0.5,
    ignore_index: int = -100,
    temperature: float = 1.0,
    **how: Any,
) -> Tensor:
    """`jsd` of log_softmax(logits / temperature), in fp32 from logits rounded once; `how` changes no result."""
    wide = torch.promote_types(student_input.dtype, torch.float32)
    student = F.linear(student_input, student_weight).to(wide) / temperature
    teacher = teacher_input if teacher_weight is None else F.linear(teacher_input, teacher_weight)
    teacher = teacher.to(wide) / temperature
    extra = teacher.shape[1] - student.shape[1]
    student, teacher = F.pad(student, (0, max(extra, 0))), F.pad(teacher, (0, max(-extra, 0)))
    log_q, log_p = student.log_softmax(-1), teacher.log_softmax(-1)
    return jsd(log_q, log_p, shift_labels, beta=jsd_beta, ignore_index=ignore_index)
