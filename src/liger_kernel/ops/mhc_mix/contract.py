"""What computes weighted sums of streams has to offer, and the options that reach it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from liger_kernel._core.contract import Backward, Needs, Saved
from liger_kernel._core.options import OpOptions


@dataclass(frozen=True)
class MHCMixOptions(OpOptions):
    """None."""


class Kernels(Backward, Protocol):
    def forward(
        self,
        x: Tensor,
        weights: Tensor,
        f: Tensor | None,
        f_weights: Tensor | None,
        *,
        options: MHCMixOptions,
        needs: Needs,
    ) -> tuple[Tensor, Saved]:
        """y (..., O, C) of x (..., I, C), weights (..., O, I), f (..., C), f_weights (..., O); and what is saved."""
