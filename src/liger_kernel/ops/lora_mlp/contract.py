"""What makes the thin products of a gated block beside the gated one, where matrix products would pass over memory."""

from __future__ import annotations

from typing import NamedTuple, Protocol

from torch import Tensor

from liger_kernel.ops.glu.contract import GLUOptions


class Thin(NamedTuple):
    """What an adapter adds to a product: scaling * middle @ lora_b.T.

    middle: (T, r), rows of any stride. lora_b: (F, r).
    """

    middle: Tensor
    lora_b: Tensor
    scaling: float


class Kernels(Protocol):
    """Of tensors in one dtype of 16 bits, with T and ranks r that are not zero, and r at most `RANK`."""

    RANK: int

    def forward(
        self,
        gate: Tensor,
        up: Tensor,
        of_gate: Thin,
        of_up: Thin,
        lora_a: Tensor,
        *,
        options: GLUOptions,
    ) -> tuple[Tensor, Tensor]:
        """product = f(gate + its thin product) * (up + its own) (T, F), and product @ lora_a.T (T, r)."""

    def backward(
        self,
        dy: Tensor,
        gate: Tensor,
        up: Tensor,
        of_gate: Thin,
        of_up: Thin,
        inner: Tensor,
        lora_a: Tensor,
        *,
        options: GLUOptions,
        into: tuple[Tensor, Tensor] | None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Of the gradient of the product, dy + inner @ lora_a: those of gate, up, both B (F, r), and inner.T @ product
        (r, F).

        The first two take the memory of `into`, which may be gate and up.
        """
