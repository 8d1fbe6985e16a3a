"""What computes the choice of experts has to offer, and the options that reach it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from liger_kernel._core.contract import Backward, Needs, Partial, Saved
from liger_kernel._core.options import OpOptions


@dataclass(frozen=True)
class RouterOptions(OpOptions):
    top_k: int
    score: str = "softmax"
    n_groups: int = 1
    groups_kept: int = 1
    normalize: bool = True
    scale: float = 1.0


class Kernels(Backward, Partial, Protocol):
    def forward(
        self, logits: Tensor, bias: Tensor | None, *, options: RouterOptions, needs: Needs
    ) -> tuple[tuple[Tensor, Tensor], Saved]:
        """Weights (T, K) in the dtype of logits (T, E), indices (T, K) int64, and what `backward` is given."""
