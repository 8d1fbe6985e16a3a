"""What computes the dynamic tanh has to offer, and the options that reach it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from liger_kernel._core.contract import Backward, Needs, Saved
from liger_kernel._core.options import OpOptions


@dataclass(frozen=True)
class DyTOptions(OpOptions):
    """None."""


class Kernels(Backward, Protocol):
    def forward(
        self,
        x: Tensor,
        alpha: Tensor,
        gamma: Tensor,
        beta: Tensor | None,
        *,
        options: DyTOptions,
        needs: Needs,
    ) -> tuple[Tensor, Saved]:
        """y (..., N) of x (..., N), and what `backward` is given as `saved`."""
