"""What computes PolyNorm has to offer, and the options that reach it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from liger_kernel._core.contract import Backward, Needs, Saved
from liger_kernel._core.options import OpOptions


@dataclass(frozen=True)
class PolyNormOptions(OpOptions):
    eps: float = 1e-6


class Kernels(Backward, Protocol):
    def forward(
        self, x: Tensor, weight: Tensor, bias: Tensor, *, options: PolyNormOptions, needs: Needs
    ) -> tuple[Tensor, Saved]:
        """y (..., N) of x (..., N), and what `backward` is given as `saved`."""
