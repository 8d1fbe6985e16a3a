"""Divergences in plain PyTorch: what the specifications of the three share."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def divergence(
    terms: Callable[[Tensor, Tensor], Tensor],
    x: Tensor,
    y: Tensor,
    target: Tensor | None,
    count: Tensor | None,
    reduction: str,
    ignore_index: int = -100,
) -> Tensor:
    """`terms(x, y)` (N, V) reduced, in fp32, or float64 for float64 x; rows whose label is ignored count for nothing.

    "sum" adds the terms up, "batchmean" divides that by the number of rows that count, "mean" by that of their terms;
    where there are none, the loss is 0. `count`: the rows that count, where those given are only some of them.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    x, y = x.to(wide), y.to(wide)
    if target is not None:
        ignored = (target == ignore_index)[:, None]
        x, y = x.masked_fill(ignored, 0), y.masked_fill(ignored, 0)  # whatever they hold
        found = terms(x, y).masked_fill(ignored, 0)
        count = (~ignored).sum() if count is None else count
    else:
        found = terms(x, y)
    if reduction == "none":
        return found
    total = found.sum()
    if reduction == "sum":
        return total
    total = total / (max(1, x.shape[0]) if count is None else count.clamp(min=1))
    return total / max(1, x.shape[1]) if reduction == "mean" else total


def kl_terms(log_p: Tensor, log_q: Tensor) -> Tensor:
    """p (log p - log q), 0 where p is 0."""
    p = log_p.exp()
    return p * (log_p - log_q).masked_fill(p == 0, 0)
