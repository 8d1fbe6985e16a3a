"""What computes the JSD has to offer, and the options that reach it."""

from __future__ import annotations

from dataclasses import dataclass

from liger_kernel.ops.divergences.contract import DivergenceOptions, Kernels

__all__ = ["JSDOptions", "Kernels"]


@dataclass(frozen=True)
class JSDOptions(DivergenceOptions):
    """beta: the weight of the fixed distribution in the mixture; ignore_index: the label of rows that do not count.

    Raises: ValueError for a beta outside of [0, 1]."""

    name = "jsd"
    beta: float = 0.5
    ignore_index: int = -100

    def __post_init__(self) -> None:
        if not 0.0 <= self.beta <= 1.0:
            raise ValueError(f"beta={self.beta} is not between 0.0 and 1.0.")

    @property
    def form(self) -> tuple[str, float]:
        return {0.0: "kl_log", 1.0: "kl_back"}.get(self.beta, "jsd"), self.beta
