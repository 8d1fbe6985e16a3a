"""What computes the modulated RMSNorm has to offer, and the options that reach it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from liger_kernel._core.contract import Backward, Needs, Saved
from liger_kernel._core.options import OpOptions


@dataclass(frozen=True)
class ModulatedRMSNormOptions(OpOptions):
    eps: float = 1e-6
    offset: float = 0.0
    casting_mode: str = "llama"


class Kernels(Backward, Protocol):
    def forward(
        self,
        x: Tensor,
        weight: Tensor | None,
        scale: Tensor,
        shift: Tensor | None,
        *,
        options: ModulatedRMSNormOptions,
        needs: Needs,
    ) -> tuple[Tensor, Saved]:
        """y (..., N) of x (..., N), and what `backward` is given as `saved`."""
