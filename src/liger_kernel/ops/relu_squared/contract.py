"""What computes the squared ReLU has to offer, and the options that reach it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from liger_kernel._core.contract import Backward, Needs, Saved
from liger_kernel._core.options import OpOptions


@dataclass(frozen=True)
class ReLUSquaredOptions(OpOptions):
    """None."""


class Kernels(Backward, Protocol):
    def forward(
        self, x: Tensor, *, options: ReLUSquaredOptions, needs: Needs
    ) -> tuple[Tensor, Saved]:
        """y like x, and what `backward` is given as `saved`."""
