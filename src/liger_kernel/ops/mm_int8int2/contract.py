"""What computes the product of int8 with packed 2-bit integers has to offer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from liger_kernel._core.contract import Needs, Saved
from liger_kernel._core.options import OpOptions


@dataclass(frozen=True)
class Int8Int2Options(OpOptions):
    """None."""


class Kernels(Protocol):
    def forward(
        self, a: Tensor, b: Tensor, *, options: Int8Int2Options, needs: Needs
    ) -> tuple[Tensor, Saved]:
        """(M, N) int32 of a (M, K) int8 and b (K / 4, N) uint8; nothing is kept."""
