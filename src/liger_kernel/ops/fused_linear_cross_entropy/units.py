"""Losses of whole sequences: how a token counts is known once the losses of all tokens of its sequence are.

Such a loss needs one walk over the logits, like any other, if a chunk holds whole sequences.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from liger_kernel.ops.fused_linear_cross_entropy.label_count import LabelCount, kept_rows


@dataclass(frozen=True)
class Units:
    """Rows that are weighed together.

    size: rows of a unit; with 1, a row stands for itself.
    order: (N,) int64, the rows such that those of a unit follow each other. None: they already do.
    row_scale: from the losses (C,) of some units, and their rows (a slice, or indices (C,)), to the weights (C,).
    """

    size: int
    order: Tensor | None
    row_scale: Callable[[Tensor, slice | Tensor], Tensor]


def rows_to_walk(
    target: Tensor, ignore_index: int, label_count: LabelCount | int | None, units: Units | None
) -> tuple[Tensor | None, list[int] | None]:
    """The rows in the order to walk them (None: as they are), and the sizes of the units (None: any cut will do).

    Rows to be ignored are left out where their number is known, as it is on the CPU.
    """
    if units is None or units.size == 1:
        return kept_rows(target, ignore_index, label_count), None
    n_rows = target.shape[0]
    if target.device.type != "cpu":
        return units.order, [units.size] * (n_rows // units.size)
    order = torch.arange(n_rows) if units.order is None else units.order
    labelled = (target != ignore_index)[order]
    return order[labelled], labelled.view(-1, units.size).sum(1).tolist()


def chunks(n_rows: int, rows: int, sizes: Sequence[int] | None) -> list[slice]:
    """`n_rows` in slices of at most `rows`; units of given `sizes` stay whole, and one may be larger than that."""
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
