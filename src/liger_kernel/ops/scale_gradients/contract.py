"""What multiplies gradients has to offer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor


class Kernels(Protocol):
    def scale_(self, buffers: Sequence[Tensor], factor: Tensor) -> None:
        """Multiply one to three contiguous buffers by the 0-d `factor`, in place."""
