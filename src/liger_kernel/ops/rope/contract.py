"""What computes the rotary embedding has to offer, and the options that reach it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from liger_kernel._core.contract import Backward, Grads, Needs, Saved
from liger_kernel._core.options import OpOptions


@dataclass(frozen=True)
class RopeOptions(OpOptions):
    unsqueeze_dim: int = 1
    rotary_dim: int = 0  # even, at most the head dimension
    interleaved: bool = False
    mrope_section: tuple[int, ...] | None = None
    mrope_interleaved: bool = False


class Kernels(Backward, Protocol):
    def forward(
        self,
        q: Tensor,
        k: Tensor | None,
        cos: Tensor,
        sin: Tensor,
        *,
        options: RopeOptions,
        needs: Needs,
    ) -> tuple[Grads, Saved]:
        """(q', k'), and what `backward` is given as `saved`.

        cos and sin: (1 or B, S, R), or (3, 1 or B, S, R) with an `mrope_section`; one layout, a stride of 1 or 2 in the
        last dimension.
        """
