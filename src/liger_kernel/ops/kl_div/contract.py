"""What computes the KL divergence has to offer, and the options that reach it."""

from __future__ import annotations

from dataclasses import dataclass

from liger_kernel.ops.divergences.contract import DivergenceOptions, Kernels

__all__ = ["KLDivOptions", "Kernels"]


@dataclass(frozen=True)
class KLDivOptions(DivergenceOptions):
    name = "kl_div"
    reduction: str = "batchmean"
    log_target: bool = False
    eps: float = 1e-10

    @property
    def form(self) -> tuple[str, float]:
        return ("kl_log", 0.0) if self.log_target else ("kl", self.eps)
