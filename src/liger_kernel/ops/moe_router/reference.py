"""The choice of experts, and of their weights, in plain PyTorch: the specification."""

from __future__ import annotations

import torch
from torch import Tensor


def moe_router(
    logits: Tensor,
    bias: Tensor | None,
    top_k: int,
    score: str,
    n_groups: int,
    groups_kept: int,
    normalize: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    scores = wide.softmax(-1) if score == "softmax" else wide.sigmoid()
    choice = scores.detach()
    if bias is not None:
        choice = choice + bias.detach()
    if groups_kept < n_groups:
        groups = choice.unflatten(-1, (n_groups, -1))  # (T, G, E / G)
        best = groups.topk(min(2, groups.shape[-1]), -1).values.sum(-1)
        kept = torch.zeros_like(best).scatter(-1, best.topk(groups_kept, -1).indices, 1.0)
        choice = groups.masked_fill(kept[..., None] == 0, -torch.inf).flatten(-2)
    index = choice.topk(top_k, -1).indices
    weights = scores.gather(-1, index)
    if normalize:
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
    return (weights * scale).to(logits.dtype), index
