"""In plain PyTorch."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor


def scale_(buffers: Sequence[Tensor], factor: Tensor) -> None:
    for buffer in buffers:
        buffer.mul_(factor)
