"""A linear layer and the KL divergence to its softmax with all logits in memory: the specification."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from liger_kernel.ops.divergences.reference import divergence


def fused_linear_kl_div(
    student_input: Tensor,
    student_weight: Tensor,
    target: Tensor,
    shift_labels: Tensor | None = None,
    *,
    reduction: str = "batchmean",
    ignore_index: int = -100,
    temperature: float = 1.0,
    eps: float = 1e-10,
    **how: Any,
) -> Tensor:
    """KL divergence from `target` to softmax(logits / temperature), in fp32 from logits that are rounded once."""
    wide = torch.promote_types(student_input.dtype, torch.float32)
    log_q = (F.linear(student_input, student_weight).to(wide) / temperature).log_softmax(-1)

    def terms(x: Tensor, y: Tensor) -> Tensor:
        return torch.where(y == 0, 0.0, y * (y.clamp(min=eps).log() - x))

    return divergence(terms, log_q, target, shift_labels, None, reduction, ignore_index)
