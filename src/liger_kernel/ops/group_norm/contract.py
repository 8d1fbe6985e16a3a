"""What computes GroupNorm has to offer, and the options that reach it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from liger_kernel._core.contract import Backward, Needs, Saved
from liger_kernel._core.options import OpOptions


@dataclass(frozen=True)
class GroupNormOptions(OpOptions):
    num_groups: int
    eps: float = 1e-5


class Kernels(Backward, Protocol):
    def forward(
        self,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        *,
        options: GroupNormOptions,
        needs: Needs,
    ) -> tuple[Tensor, Saved]:
        """y (B, C, ...) of x (B, C, ...), and what `backward` is given as `saved`."""
