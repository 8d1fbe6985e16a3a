"""What computes attention residuals has to offer, and the options that reach it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from liger_kernel._core.contract import Backward, Needs, Saved
from liger_kernel._core.options import OpOptions


@dataclass(frozen=True)
class AttnResOptions(OpOptions):
    eps: float = 1e-6
    normed: bool = False


class Kernels(Backward, Protocol):
    def forward(
        self,
        blocks: Tensor,
        w_query: Tensor,
        w_norm: Tensor,
        *,
        options: AttnResOptions,
        needs: Needs,
    ) -> tuple[Tensor, Saved]:
        """h (..., D) of blocks (N, ..., D), w_query and w_norm (D,), and what is saved."""
