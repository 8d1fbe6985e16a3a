"""What computes add + RMSNorm has to offer, and the options that reach it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from liger_kernel._core.contract import Backward, Needs, Saved
from liger_kernel.ops.rms_norm.contract import RMSNormOptions


@dataclass(frozen=True)
class FusedAddRMSNormOptions(RMSNormOptions):
    """Those of the norm."""


class Kernels(Backward, Protocol):
    def forward(
        self,
        x: Tensor,
        residual: Tensor | None,
        weight: Tensor | None,
        *,
        options: FusedAddRMSNormOptions,
        needs: Needs,
    ) -> tuple[tuple[Tensor, Tensor], Saved]:
        """(y, x + residual or x), and what `backward` is given as `saved`."""
