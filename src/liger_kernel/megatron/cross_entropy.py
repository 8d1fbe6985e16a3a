"""Cross entropy with Megatron's defaults."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from liger_kernel._core.declared import takes
from liger_kernel.transformers.modules.vocab_parallel_cross_entropy import (
    LigerVocabParallelCrossEntropy,
    VocabParallelCrossEntropyOptions,
)


@dataclass(frozen=True)
class MegatronCrossEntropyOptions(VocabParallelCrossEntropyOptions):
    label_smoothing_formula: str = "megatron"
    label_smoothing_mode: str = "partition"


class LigerMegatronCrossEntropy(LigerVocabParallelCrossEntropy):
    """`LigerVocabParallelCrossEntropy` with label smoothing as Megatron computes it, on the classes of each rank.

    A label that is no class has loss 0: Megatron leaves such labels, of padding, to its loss mask.
    """

    @takes(MegatronCrossEntropyOptions)
    def __init__(self) -> None: ...

    def forward(
        self, vocab_parallel_logits: Tensor, target: Tensor, tp_group: Any = None
    ) -> Tensor:
        ranks = 1 if tp_group is None else tp_group.size()
        no_class = (target < 0) | (target >= vocab_parallel_logits.shape[-1] * ranks)
        return super().forward(
            vocab_parallel_logits, target.masked_fill(no_class, self.ignore_index), tp_group
        )
