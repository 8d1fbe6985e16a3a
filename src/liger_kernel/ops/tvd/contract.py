"""What computes the total variation distance has to offer, and the options that reach it."""

from __future__ import annotations

from dataclasses import dataclass

from liger_kernel.ops.divergences.contract import DivergenceOptions, Kernels

__all__ = ["Kernels", "TVDOptions"]


@dataclass(frozen=True)
class TVDOptions(DivergenceOptions):
    """reduction: "batchmean", "mean", "sum" or "none"; ignore_index: the label of rows that do not count.

    Raises: ValueError for another reduction."""

    name = "tvd"
    reduction: str = "batchmean"
    ignore_index: int = -100

    @property
    def form(self) -> tuple[str, float]:
        return "tvd", 0.0
