"""What computes LayerNorm has to offer, and the options that reach it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from liger_kernel._core.contract import Backward, Needs, Saved
from liger_kernel._core.options import OpOptions


@dataclass(frozen=True)
class LayerNormOptions(OpOptions):
    eps: float = 1e-5
    # no fields: what the kernels shared with RMSNorm read; nothing is added to the weight, y is rounded once
    offset = 0.0
    casting_mode = "gemma"


class Kernels(Backward, Protocol):
    def forward(
        self,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        *,
        options: LayerNormOptions,
        needs: Needs,
    ) -> tuple[Tensor, Saved]:
        """y (..., N) of x (..., N), and what `backward` is given as `saved`."""
