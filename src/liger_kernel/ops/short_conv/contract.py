"""What computes the gated short convolution has to offer, and the options that reach it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from liger_kernel._core.contract import Backward, Needs, Saved
from liger_kernel._core.options import OpOptions


@dataclass(frozen=True)
class ShortConvOptions(OpOptions):
    """None."""


class Kernels(Backward, Protocol):
    def forward(
        self,
        bcx: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        *,
        options: ShortConvOptions,
        needs: Needs,
    ) -> tuple[Tensor, Saved]:
        """y (..., S, C) of bcx (..., S, 3 C), weight (C, K) and bias (C,); and what is saved."""
