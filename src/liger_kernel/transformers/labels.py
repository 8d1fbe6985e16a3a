"""HuggingFace's conventions for the labels of a causal LM: how they are shifted, and what divides their loss."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def shifted(labels: Tensor | None, shift_labels: Tensor | None, ignore_index: int) -> Tensor:
    """`shift_labels`, or `labels` (B, S) moved one to the left with `ignore_index` at the end."""
    if shift_labels is not None:
        return shift_labels
    if labels is None:
        raise ValueError("The loss got neither labels nor shift_labels; pass one of them.")
    return F.pad(labels, (0, 1), value=ignore_index)[..., 1:]


def per_item(loss: Tensor, num_items_in_batch: int | Tensor | None) -> Tensor:
    """A summed loss divided by the number of items, if one is given."""
    if num_items_in_batch is None:
        return loss
    if isinstance(num_items_in_batch, Tensor):
        num_items_in_batch = num_items_in_batch.to(loss.device)
    return loss / num_items_in_batch
