"""What computes RMSNorm and rotary embedding of heads has to offer, and the options that reach it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from liger_kernel._core.contract import Backward, Grads, Needs, Saved
from liger_kernel._core.options import OpOptions


@dataclass(frozen=True)
class QKNormRopeOptions(OpOptions):
    eps: float = 1e-6
    offset: float = 0.0
    casting_mode: str = "llama"
    unsqueeze_dim: int = 1
    rotary_dim: int = 0  # even, at most the head dimension
    interleaved: bool = False


class Kernels(Backward, Protocol):
    def forward(
        self,
        q: Tensor,
        k: Tensor | None,
        q_weight: Tensor | None,
        k_weight: Tensor | None,
        cos: Tensor,
        sin: Tensor,
        *,
        options: QKNormRopeOptions,
        needs: Needs,
    ) -> tuple[Grads, Saved]:
        """(q', k'), and what `backward` is given as `saved`.

        A weight has as many elements as a head, or as all heads of a token. cos and sin: (1 or B, S, R), one layout, a
        stride of 1 or 2 in the last dimension.
        """
