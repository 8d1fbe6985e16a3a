"""What computes the squared ReLU has to offer, and the options that reach it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from liger_kernel._core.options import OpOptions

Saved = tuple[Tensor | None, ...]


@dataclass(frozen=True)
class ReLUSquaredOptions(OpOptions):
    """None."""


class Kernels(Protocol):
    def forward(
        self, x: Tensor, *, options: ReLUSquaredOptions, needs: Sequence[bool]
    ) -> tuple[Tensor, Saved]:
        """y like x, and what `backward` is given as `saved`."""

    def backward(
        self,
        grads: Sequence[Tensor | None],
        saved: Saved,
        *,
        options: ReLUSquaredOptions,
        needs: Sequence[bool],
    ) -> tuple[Tensor | None, ...]:
        """The gradient of x."""
