"""In plain PyTorch."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from liger_kernel.backends import can_look


def scale_(buffers: Sequence[Tensor], factor: Tensor) -> None:
    if can_look(factor) and factor == 1:  # what `loss.backward()` sends
        return
    for buffer in buffers:
        buffer.mul_(factor)
