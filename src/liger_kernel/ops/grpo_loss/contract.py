"""What computes the GRPO family of losses of given logits has to offer, and the options that reach it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from liger_kernel._core.checks import check_choice
from liger_kernel._core.contract import Backward, Needs, Saved
from liger_kernel._core.options import OpOptions
from liger_kernel.ops.grpo_loss.reference import NOT_COUNTED

__all__ = ["NOT_COUNTED", "GRPOLossOptions", "Kernels"]

CLIPPED = ("grpo", "bnpo", "dr_grpo", "dapo", "luspo")
TOKEN_LEVEL_ONLY = ("cispo", "sapo", "vespo")
LOSS_TYPES = (*CLIPPED, *TOKEN_LEVEL_ONLY)


@dataclass(frozen=True)
class GRPOLossOptions(OpOptions):
    """As `grpo_loss` takes them; loss_type "logps" is the log-probability in place of a loss."""

    loss_type: str = "grpo"
    temperature: float = 1.0
    beta: float = 0.0
    epsilon_low: float = 0.2
    epsilon_high: float = 0.2
    delta: float | None = None
    sapo_temperature_pos: float = 1.0
    sapo_temperature_neg: float = 1.05
    use_bias_correction_kl: bool = False
    in_place: bool = False

    def __post_init__(self) -> None:
        check_choice("loss_type", self.loss_type, (*LOSS_TYPES, "logps"))
        for name in ("temperature", "sapo_temperature_pos", "sapo_temperature_neg", "delta"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ValueError(f"{name} must be positive, got {value}.")
        if self.delta is not None and self.loss_type not in CLIPPED:
            raise ValueError(
                f"delta (two-sided clipping) is not supported for loss_type={self.loss_type!r}, only for "
                f"{', '.join(CLIPPED)}; pass delta=None."
            )


class Kernels(Backward, Protocol):
    def forward(
        self,
        logits: Tensor,
        token_ids: Tensor,
        old_logps: Tensor | None,
        ref_logps: Tensor | None,
        advantages: Tensor | None,
        weight: Tensor | None,
        sum_weight: Tensor | None,
        *,
        options: GRPOLossOptions,
        needs: Needs,
    ) -> tuple[tuple[Tensor, Tensor | None, Tensor | None], Saved]:
        """As `reference.grpo_loss`; logits (R, V), all others (R,). `backward` may overwrite the logits in place."""
