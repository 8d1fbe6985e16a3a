"""How many labels the loss is over: known on the host before the loop starts, without a stall."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from liger_kernel._core.autograd import has_numbers
from liger_kernel.backends import can_assert, can_look, facts_of

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
        if not has_numbers(labels):
            self._number: Tensor | int = labels.numel()
            return
        streams: Any = facts_of(labels.device).streams
        if streams is None:
            self._number = (labels != ignore_index).sum().cpu()
            return
        current = streams.current_stream(labels.device)
        stream = _stream(labels.device)
        stream.wait_stream(current)
        self._number = pinned = torch.empty((), dtype=torch.int64, pin_memory=True)
        with streams.stream(stream):
            pinned.copy_((labels != ignore_index).sum(), non_blocking=True)
            self._done = stream.record_event()
        labels.record_stream(stream)

    def __int__(self) -> int:
        if self._done is not None:
            self._done.synchronize()
            self._done = None
        return int(self._number)


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
    if n_rows - kept < max(1, n_rows // 32):
        return None
    if ignored is None:
        ignored = target == ignore_index
        enough = ignored.sum() >= n_rows - kept
        if can_assert(target.device.type):
            torch._assert_async(enough, _TOO_SMALL)
        elif not enough:
            raise RuntimeError(_TOO_SMALL)
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
