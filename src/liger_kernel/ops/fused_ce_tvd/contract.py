"""What computes a distance between two rows of logits has to offer, and the options that reach it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from liger_kernel._core.contract import Backward, Needs, Saved
from liger_kernel._core.options import OpOptions
from liger_kernel._core.rows import RowOutputs


@dataclass(frozen=True)
class CETVDOptions(OpOptions):
    """ignore_index: the label of rows that do not count."""

    ignore_index: int = -100


class Distance(Protocol):
    """What `step` reads of a loss: `hard_weight` cross entropy + `soft_weight` distance.

    form: of the distance, by its name in `divergences.kernels.term` or "cosine", and the number in it. The logits of
    both are divided by `temperature` in the distance. hard: whether there is a cross entropy at all.
    """

    @property
    def form(self) -> tuple[str, float] | None: ...
    @property
    def ignore_index(self) -> int: ...
    @property
    def hard_weight(self) -> float: ...
    @property
    def soft_weight(self) -> float: ...
    @property
    def temperature(self) -> float: ...
    @property
    def hard(self) -> bool: ...


class Kernels(Backward, Protocol):
    def forward(
        self,
        student: Tensor,
        teacher: Tensor,
        target: Tensor,
        *,
        options: CETVDOptions,
        needs: Needs,
    ) -> tuple[tuple[Tensor, Tensor], Saved]:
        """Cross entropy and total variation distance of each row (N,), fp32, and what `backward` is given."""

    def step(
        self,
        logits: Tensor,
        teacher: Tensor,
        target: Tensor,
        *,
        distance: Distance,
        count: Tensor | None,
        out: RowOutputs,
        grad: Tensor | None,
        row_scale: Tensor | None,
    ) -> None:
        """Write loss, distance and cross entropy of rows of logits to `out`, all divided by the 0-d `count`, and the
        gradient of sum(loss * row_scale) to `grad`, which may be the logits.

        teacher: (N, Vt) logits, or for the form "kl" what stands for probabilities; it is not written to. A class that
        only one of the two has counts as a logit, or a probability, of 0 of the other.
        """
