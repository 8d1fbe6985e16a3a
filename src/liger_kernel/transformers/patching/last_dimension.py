"""What an index, or an operand, does to the last dimension of logits, the classes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def is_bias(x: Any, shape: torch.Size, device: torch.device) -> bool:
    """Whether `x` has one number for each class of logits of that shape, the same for every token."""
    return (
        isinstance(x, Tensor)
        and x.is_floating_point()
        and x.device == device
        and 1 <= x.ndim <= len(shape)
        and x.shape[-1] == x.numel() == shape[-1]
    )


def without_classes(index: Any, ndim: int) -> tuple[Any, int | None]:
    """`[..., :k]` as (`[..., :]`, k), where a head has more rows than there are tokens; else (index, None)."""
    last = index[-1] if isinstance(index, tuple) and index else None
    if not isinstance(last, slice) or not isinstance(last.stop, int) or last.stop <= 0:
        return index, None
    reaches = any(i is Ellipsis for i in index) or _consumed(index) == ndim
    if not reaches or last.start not in (None, 0) or last.step not in (None, 1):
        return index, None
    return (*index[:-1], slice(None)), last.stop


def _consumed(index: tuple[Any, ...]) -> int:
    """How many dimensions an index without None takes, but for those of its ellipsis."""
    masks = (i.ndim for i in index if isinstance(i, Tensor) and i.dtype == torch.bool)
    others = (i for i in index if not (isinstance(i, Tensor) and i.dtype == torch.bool))
    return sum(masks) + sum(i is not Ellipsis for i in others)


def keeps_last_dimension(index: Any, ndim: int) -> bool:
    """Whether `logits[index]` selects rows only, so that `hidden[index]` selects the same ones."""
    index = index if isinstance(index, tuple) else (index,)
    if sum(i is Ellipsis for i in index) > 1 or any(i is None for i in index):
        return False
    consumed, last = _consumed(index), index[-1] if index else Ellipsis
    if last is Ellipsis:
        return consumed < ndim
    whole = isinstance(last, slice) and last == slice(None)
    if any(i is Ellipsis for i in index):
        return whole
    return consumed < ndim or (consumed == ndim and whole)
