"""What computes the gradients of a Linear with an adapter may offer beside matrix products."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor


class Kernels(Protocol):
    def thin_gradients(
        self, dy: Tensor, middle: Tensor, lora_b: Tensor, scaling: float
    ) -> tuple[Tensor, Tensor]:
        """scaling dy B (T, r) and scaling dy^T middle (O, r), of rows (T, O) and (T, r) and of B (O, r).

        All are in one dtype of 16 bits; T is not zero, and r at most 64.
        """
