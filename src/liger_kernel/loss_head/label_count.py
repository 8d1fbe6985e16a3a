"""How many labels the loss is over: known on the host before the loop starts, without a stall."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from liger_kernel._core.autograd import has_numbers, is_transformed
from liger_kernel._core.dtensor import is_dtensor
from liger_kernel.backends import can_assert, can_look, facts_of, is_capturing

_TOO_SMALL = "fused_linear_cross_entropy: more labels than label_count says; pass the count of these labels, or None"


class LabelCount:
    """The number of labels that are not ignored, on its way to the host.

    Made as soon as the labels are there, at the start of a model's forward, and read by the loss at its end: `int()`
    then waits at most for what the device was given before the labels, never for the forward in between.
    """

    def __init__(self, labels: Tensor, ignore_index: int = -100):
        """labels: integers of any shape. On a GPU they are counted on a stream of their own, elsewhere at once."""
        self.size = labels.numel()
        self.ignore_index = ignore_index
        self._done: Any = None
        streams: Any = facts_of(labels.device).streams if has_numbers(labels) else None
        if streams is None:
            self._numbers = self._counted(labels).cpu() if has_numbers(labels) else None
            return
        current = streams.current_stream(labels.device)
        stream = _stream(labels.device)
        stream.wait_stream(current)
        with streams.stream(stream):
            found = self._counted(labels)
            self._numbers = torch.empty(found.shape, dtype=torch.int64, pin_memory=True)
            self._numbers.copy_(found, non_blocking=True)
            self._done = stream.record_event()
        labels.record_stream(stream)

    def _counted(self, labels: Tensor) -> Tensor:
        return (labels != self.ignore_index).sum()

    def _arrived(self) -> Tensor | None:
        """None of labels that have no numbers."""
        if self._done is not None:
            self._done.synchronize()
            self._done = None
        return self._numbers

    def __int__(self) -> int:
        found = self._arrived()
        return self.size if found is None else int(found.sum())


class GroupCounts(LabelCount):
    """The numbers of labels of groups of rows, likewise; `int()` is that of all."""

    def __init__(self, labels: Tensor, ignore_index: int, group_size: int):
        """labels: (N,), those of a group together."""
        self.group_size = group_size
        super().__init__(labels, ignore_index)

    def _counted(self, labels: Tensor) -> Tensor:
        return (labels != self.ignore_index).view(-1, self.group_size).sum(1)

    def sizes(self) -> list[int]:
        found = self._arrived()
        if found is None:
            return [self.group_size] * (self.size // self.group_size)
        sizes: list[int] = found.tolist()
        return sizes


def may_count(labels: Tensor) -> bool:
    """A compiled or a captured graph is the same for every number of labels, and a DTensor holds only some of them."""
    return not (is_dtensor(labels) or is_transformed() or is_capturing(labels.device))


def count_labels(
    labels: Tensor, ignore_index: int, group_size: int = 1, order: Tensor | None = None
) -> LabelCount | None:
    """The count for a loss that gets its labels when it is called, in groups of `labels[order]`; None where it is not.

    On a GPU the host will wait until the device has come to the labels, and the device must have something to do
    until the host has given it the first chunk. Whoever calls this lets work that needs no count come between.
    """
    if not labels.numel() or not may_count(labels):
        return None
    if not can_look(labels) and facts_of(labels.device).streams is None:
        return None
    labels = labels.reshape(-1)
    if group_size == 1:
        return LabelCount(labels, ignore_index)
    return GroupCounts(labels if order is None else labels[order], ignore_index, group_size)


@functools.cache
def _stream(device: torch.device) -> Any:
    streams: Any = facts_of(device).streams
    return streams.Stream(device)


def kept_rows(target: Tensor, ignore_index: int, kept: LabelCount | int | None) -> Tensor | None:
    """Indices of the rows to compute, (K,) int64; None for all, where leaving some out would not pay.

    `kept` is at least the number of labels in `target` (N,) that are not ignored; where it is more, ignored rows
    follow, whose loss and gradients are zero. Without it labels on the CPU are counted here, and labels elsewhere are
    all kept. A `kept` that is too small would lose tokens: that stops the device with an assertion, or raises
    RuntimeError where a device has none.
    """
    n_rows = target.shape[0]
    ignored = None
    if kept is None and can_look(target):
        ignored = target == ignore_index
        kept = n_rows - int(ignored.sum())
    if kept is None:
        return None
    kept = int(kept)
    if not saves(kept, n_rows):
        return None
    if ignored is None:
        ignored = target == ignore_index
        enough = ignored.sum() >= n_rows - kept
        if can_assert(target.device.type):
            torch._assert_async(enough, _TOO_SMALL)
        elif not enough:
            raise RuntimeError(_TOO_SMALL)
    return labelled(ignored, kept)


def saves(kept: int, n_rows: int) -> bool:
    """Whether to leave out all but `kept` rows pays."""
    return n_rows - kept >= max(1, n_rows // 32)


def labelled(ignored: Tensor, kept: int) -> Tensor:
    """The first `kept` rows that are not `ignored` (N,), in their order."""
    return ignored.to(torch.uint8).argsort(stable=True)[:kept]


def check_label_count(count: LabelCount | int | None, n_labels: int, ignore_index: int) -> None:
    """ValueError for a count that cannot be that of `n_labels` labels with this `ignore_index`."""
    if isinstance(count, LabelCount):
        if count.ignore_index != ignore_index:
            raise ValueError(
                f"label_count was made with ignore_index={count.ignore_index}, but the loss has {ignore_index}; "
                f"pass LabelCount(target, {ignore_index})."
            )
    elif count is not None and not 0 <= count <= n_labels:
        raise ValueError(
            f"label_count={count} for {n_labels} labels; pass a number from 0 to {n_labels}, or None."
        )
