"""Losses of whole sequences: how a token counts is known once the losses of all tokens of its sequence are.

Such a loss needs its logits once, like any other, if a chunk holds whole sequences.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from liger_kernel.backends import can_look
from liger_kernel.loss_head.label_count import (
    GroupCounts,
    LabelCount,
    count_labels,
    kept_rows,
    labelled,
    saves,
)


@dataclass(frozen=True)
class RowGroups:
    """Rows that are weighed together.

    size: rows of a group; with 1, a row stands for itself.
    order: (N,) int64, the rows such that those of a group follow each other. None: they already do.
    loss_of: from the losses of all rows (N,) to the loss, and what is reported beside it. Differentiable; a sum over
    groups, no term of which reads a row of another group.
    neutral: (N,) losses at which `loss_of` is smooth: they stand for the rows of other groups.
    """

    size: int
    order: Tensor | None
    loss_of: Callable[[Tensor], tuple[Tensor, Sequence[Tensor]]]
    neutral: Tensor

    def row_scale(self, losses: Tensor, where: slice | Tensor) -> Tensor:
        """d loss / d (loss of a row), of the rows `where`, which are whole groups and have these losses."""
        everywhere = self.neutral.clone()
        everywhere[where] = losses
        leaf = everywhere.requires_grad_()
        with torch.enable_grad():
            (grad,) = torch.autograd.grad(self.loss_of(leaf)[0], leaf)
        return grad[where]

    def loss_and_reported(self, losses: Tensor) -> tuple[Tensor, ...]:
        """What the caller gets. Raises: ValueError if the loss has a gradient with respect to anything but `losses`."""
        with torch.enable_grad():
            value, reported = self.loss_of(losses.detach())
        if value.requires_grad:
            raise ValueError(
                "The function of the loss reads a tensor that requires a gradient, which it would not get here: only "
                "hidden states, weight and bias do. Pass it detached, or compute the loss of linear_logprobs(...)."
            )
        return value, *reported


def rows_to_visit(
    target: Tensor,
    ignore_index: int,
    label_count: LabelCount | int | None,
    groups: RowGroups | None,
) -> tuple[Tensor | None, list[int] | None]:
    """The rows in the order to visit them (None: as they are), and the sizes of the groups (None: any cut will do).

    Rows to be ignored are left out where their number is known: by `label_count`, and on the CPU.
    """
    if groups is None or groups.size == 1:
        return kept_rows(target, ignore_index, label_count), None
    n_rows, order = target.shape[0], groups.order
    counts = label_count
    if counts is None and can_look(target):
        counts = count_labels(target, ignore_index, groups.size, order)
    if not isinstance(counts, GroupCounts) or not saves(int(counts), n_rows):
        return order, [groups.size] * (n_rows // groups.size)
    ignored = target == ignore_index
    kept = labelled(ignored if order is None else ignored[order], int(counts))
    return kept if order is None else order[kept], counts.sizes()


def cut(n_rows: int, rows: int, sizes: Sequence[int] | None) -> list[slice]:
    """`n_rows` in slices of at most `rows`; groups of given `sizes` stay whole, and one may be larger than that."""
    if sizes is None:
        return [slice(start, min(start + rows, n_rows)) for start in range(0, n_rows, rows)]
    found: list[slice] = []
    start = stop = 0
    for size in sizes:
        if stop > start and stop + size - start > rows:
            found.append(slice(start, stop))
            start = stop
        stop += size
    return [*found, slice(start, stop)] if stop > start else found
