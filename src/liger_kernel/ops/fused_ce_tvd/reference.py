"""Cross entropy and total variation distance of logits in plain PyTorch: the specification."""

from __future__ import annotations

import torch
from torch import Tensor


def fused_ce_tvd(
    student_logits: Tensor, teacher_logits: Tensor, target: Tensor, *, ignore_index: int = -100
) -> tuple[Tensor, Tensor]:
    """lse - x_y, and sum |p - q| / 2 of the softmaxes, of each row (N,); in fp32, or float64 for float64 logits.

    A row whose label is ignored has 0 in both; a label that is no class gives NaN in the first.
    """
    wide = torch.promote_types(student_logits.dtype, torch.float32)
    ignored, n_classes = target == ignore_index, student_logits.shape[1]
    x, y = (t.to(wide).masked_fill(ignored[:, None], 0) for t in (student_logits, teacher_logits))
    log_q, log_p = x.log_softmax(-1), y.log_softmax(-1)
    at_label = log_q.gather(1, target.clamp(0, n_classes - 1)[:, None])[:, 0]
    ce = -at_label.masked_fill((target < 0) | (target >= n_classes), torch.nan)
    tvd = 0.5 * (log_q.exp() - log_p.exp()).abs().sum(-1)
    return ce.masked_fill(ignored, 0), tvd.masked_fill(ignored, 0)
