"""What computes a divergence has to offer, and what the shared code reads of the options of each."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from liger_kernel._core.checks import check_choice
from liger_kernel._core.contract import Backward, Needs, Saved
from liger_kernel._core.options import OpOptions

REDUCTIONS = ("batchmean", "mean", "sum", "none")


@dataclass(frozen=True)
class DivergenceOptions(OpOptions):
    """What callers may choose is a field of the op's own dataclass."""

    name = ""
    reduction = "batchmean"
    ignore_index = -100

    def __post_init__(self) -> None:
        check_choice("reduction", self.reduction, REDUCTIONS)

    @property
    def form(self) -> tuple[str, float]:
        """The formula of a class, by its name in `kernels.py`, and the number in it."""
        raise NotImplementedError


class Kernels(Backward, Protocol):
    def forward(
        self,
        x: Tensor,
        y: Tensor,
        target: Tensor | None,
        count: Tensor | None,
        *,
        options: DivergenceOptions,
        needs: Needs,
    ) -> tuple[Tensor, Saved]:
        """The loss of (N, V) x against y: 0-d, or (N, V) with reduction "none"; and what `backward` is given.

        target: (N,) int64 labels, of which those equal to `ignore_index` take their rows out. count: 0-d, the rows
        that a mean is over; None for all N. At least fp32, as the loss is.
        """
