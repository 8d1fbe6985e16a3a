"""What computes the coefficients of hyper-connections has to offer, and the options that reach it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from liger_kernel._core.contract import Backward, Needs, Saved
from liger_kernel._core.options import OpOptions


@dataclass(frozen=True)
class MHCSinkhornOptions(OpOptions):
    tmax: int = 20
    pre_eps: float = 0.0
    sinkhorn_eps: float = 1e-6
    post_mult: float = 2.0


class Kernels(Backward, Protocol):
    def forward(
        self,
        mix: Tensor,
        b: Tensor,
        alpha_pre: Tensor,
        alpha_post: Tensor,
        alpha_res: Tensor,
        *,
        options: MHCSinkhornOptions,
        needs: Needs,
    ) -> tuple[tuple[Tensor, Tensor, Tensor], Saved]:
        """(..., HC), (..., HC) and (..., HC, HC) in fp32, and what is saved."""
