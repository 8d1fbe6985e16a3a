"""What computes add + RMSNorm has to offer, and the options that reach it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from liger_kernel._core.options import OpOptions

Saved = tuple[Tensor | None, ...]


@dataclass(frozen=True)
class FusedAddRMSNormOptions(OpOptions):
    eps: float = 1e-6
    offset: float = 0.0
    casting_mode: str = "llama"


class Kernels(Protocol):
    def forward(
        self,
        x: Tensor,
        residual: Tensor,
        weight: Tensor | None,
        *,
        options: FusedAddRMSNormOptions,
        needs: Sequence[bool],
    ) -> tuple[tuple[Tensor, Tensor], Saved]:
        """(y, x + residual), and what `backward` is given as `saved`."""

    def backward(
        self,
        grads: Sequence[Tensor | None],
        saved: Saved,
        *,
        options: FusedAddRMSNormOptions,
        needs: Sequence[bool],
    ) -> tuple[Tensor | None, ...]:
        """The gradients of x, residual (the same) and weight; of the two in `grads`, one may be None."""
