"""Jensen-Shannon divergence in plain PyTorch: the specification."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from liger_kernel.ops.divergences.reference import divergence, kl_terms

FLOOR = -1e4  # its exponential is 0; where both logarithms are -inf, that of the mixture would have no derivative


def jsd(
    log_q: Tensor,
    log_p: Tensor,
    shift_labels: Tensor | None = None,
    count: Tensor | None = None,
    *,
    beta: float = 0.5,
    ignore_index: int = -100,
) -> Tensor:
    """beta KL(p || m) + (1 - beta) KL(q || m), m = beta p + (1 - beta) q; beta 0 is KL(p || q), beta 1 KL(q || p).

    A mean over the rows that count, rounded to the dtype of log_q.
    """

    def terms(x: Tensor, y: Tensor) -> Tensor:
        if beta == 0.0:
            return kl_terms(y, x)
        if beta == 1.0:
            return kl_terms(x, y)
        x_, y_ = x.clamp(min=FLOOR), y.clamp(min=FLOOR)
        m = torch.logaddexp(x_ + math.log1p(-beta), y_ + math.log(beta))
        return beta * kl_terms(y, m) + (1 - beta) * kl_terms(x, m)

    found = divergence(terms, log_q, log_p, shift_labels, count, "batchmean", ignore_index)
    return found.to(log_q.dtype)
