"""What computes a mixture of experts has to offer, and the options that reach it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from liger_kernel._core.contract import Backward, Grads, Needs, Saved
from liger_kernel._core.options import OpOptions


@dataclass(frozen=True)
class MoEOptions(OpOptions):
    activation: str = "silu"
    gated: bool = True
    interleaved: bool = False
    transposed: bool = False
    limit: float | None = None
    alpha: float = 1.0
    up_shift: float = 0.0
    gate_up_scaling: float = 1.0
    down_scaling: float = 1.0


class Kernels(Backward, Protocol):
    def forward(
        self,
        x: Tensor,
        gate_up_weight: Tensor,
        down_weight: Tensor,
        top_k_index: Tensor,
        top_k_weights: Tensor,
        gate_up_bias: Tensor | None,
        down_bias: Tensor | None,
        gate_up_a: Tensor | None,
        gate_up_b: Tensor | None,
        down_a: Tensor | None,
        down_b: Tensor | None,
        *,
        options: MoEOptions,
        needs: Needs,
    ) -> tuple[Tensor, Saved]:
        """The output (T, H) like x, and what `backward` is given: the tensors without the index, the output of the
        first product and those of `gate_up_a` and `down_a`, if somebody needs them, and three tensors of
        `pipeline.Routing`; `library.py` hands them on."""

    def backward_over(
        self, grads: Grads, saved: Saved, *, options: MoEOptions, needs: Needs
    ) -> Grads:
        """`backward`, which may write over the output of the first product in `saved`."""
