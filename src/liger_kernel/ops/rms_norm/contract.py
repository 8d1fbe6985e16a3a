"""What computes RMSNorm has to offer, and the options that reach it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from liger_kernel._core.contract import Backward, Needs, Saved
from liger_kernel._core.options import OpOptions


@dataclass(frozen=True)
class RMSNormOptions(OpOptions):
    eps: float = 1e-6
    offset: float = 0.0
    casting_mode: str = "llama"


class Kernels(Backward, Protocol):
    def forward(
        self, x: Tensor, weight: Tensor | None, *, options: RMSNormOptions, needs: Needs
    ) -> tuple[Tensor, Saved]:
        """y (..., N) of x (..., N), and what `backward` is given as `saved`."""


class Factors(Protocol):
    """What a file of this norm, or of one with a residual, may add, for who would keep y beside what the norm keeps."""

    def factors(
        self, saved: Saved, options: RMSNormOptions
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Of what `forward` saved: rows (R, N), rstd (R,) and weight (N,), whose product is y but for its rounding."""
