"""What computes the sparsemax has to offer, and the options that reach it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from liger_kernel._core.contract import Backward, Needs, Saved
from liger_kernel._core.options import OpOptions


@dataclass(frozen=True)
class SparsemaxOptions(OpOptions):
    """causal: row i of each matrix (..., L, L) is over columns 0 to i, and 0 beyond, whatever stands there."""

    causal: bool = False


class Kernels(Backward, Protocol):
    def forward(
        self, x: Tensor, *, options: SparsemaxOptions, needs: Needs
    ) -> tuple[Tensor, Saved]:
        """y (..., V) of x (..., V), and what `backward` is given as `saved`."""
