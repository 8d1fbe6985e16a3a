"""What computes the gated product has to offer, and the options that reach it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from liger_kernel._core.contract import Backward, Grads, Needs, Saved
from liger_kernel._core.options import OpOptions


@dataclass(frozen=True)
class GLUOptions(OpOptions):
    activation: str = "silu"
    gate_multiplier: float = 1.0
    down_multiplier: float = 1.0
    limit: float | None = None
    alpha: float = 1.0
    interleaved: bool = False


class Kernels(Backward, Protocol):
    def forward(
        self, gate: Tensor, up: Tensor | None, *, options: GLUOptions, needs: Needs
    ) -> tuple[Tensor, Saved]:
        """y (..., F), and what `backward` is given. Without `up`, gate (..., 2F) holds both."""

    def backward_with_output(
        self,
        dy: Tensor,
        saved: Saved,
        *,
        options: GLUOptions,
        needs: Needs,
        into: Grads | None = None,
    ) -> tuple[Grads, Tensor]:
        """The gradients of gate and up as rows, and the output of the forward, which may take the memory of dy (R, F).

        The gradients may take the memory of `into`, which may be `saved`.
        """
