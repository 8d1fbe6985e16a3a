"""Cross entropy over classes that are spread over ranks, as a module."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from liger_kernel._core.declared import LossModule, takes
from liger_kernel.distributed.vocab_parallel_cross_entropy import validate_formula_and_mode
from liger_kernel.ops import LigerVocabParallelCEFunction


@dataclass(frozen=True)
class VocabParallelCrossEntropyOptions:
    """label_smoothing_mode: labels are smoothed over all K classes, or over the K of each rank.
    label_smoothing_formula: "megatron" smooths by label_smoothing * K / (K - 1). reduction: "none" only.

    Raises: ValueError for an option outside of its range."""

    ignore_index: int = -100
    label_smoothing: float = 0.0
    reduction: str = "none"
    label_smoothing_formula: str = "pytorch"
    label_smoothing_mode: str = "global"

    def __post_init__(self) -> None:
        if self.reduction != "none":
            raise ValueError(f"reduction={self.reduction!r}; pass 'none' and reduce the losses.")
        if not 0.0 <= self.label_smoothing < 1.0:
            raise ValueError(f"label_smoothing={self.label_smoothing} is not in [0.0, 1.0).")
        validate_formula_and_mode(self.label_smoothing_formula, self.label_smoothing_mode)


class LigerVocabParallelCrossEntropy(LossModule):
    """The loss of each token, of logits whose classes are spread over the ranks of a tensor-parallel group."""

    @takes(VocabParallelCrossEntropyOptions)
    def __init__(self) -> None: ...

    def forward(
        self, vocab_parallel_logits: Tensor, target: Tensor, tp_group: Any = None
    ) -> Tensor:
        """Logits (S, B, classes of this rank), target (S, B) with classes of all ranks. Returns (S, B) fp32."""
        options = self.chosen()
        del options["reduction"]
        return LigerVocabParallelCEFunction.apply(
            vocab_parallel_logits, target, tp_group, **options
        )
