"""Cross entropy as a row loss: `liger_kernel.ops.cross_entropy` does the step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from liger_kernel._core.rows import RowOutputs
from liger_kernel.backends import kernels_of
from liger_kernel.loss_head.row_loss import RowLoss
from liger_kernel.ops.cross_entropy import reference
from liger_kernel.ops.cross_entropy.contract import CrossEntropyOptions, CrossEntropyRows, Totals

Prepared = tuple[Totals, Tensor | None]


@dataclass(frozen=True)
class CrossEntropyLoss(CrossEntropyOptions, RowLoss):
    """Options: `CrossEntropyOptions`. Returns (loss, z_loss, token_accuracy, predicted_tokens)."""

    name: ClassVar[str] = "cross_entropy"

    def prepare(self, target: Tensor, class_weight: Tensor | None) -> Prepared:
        weight = None if class_weight is None else class_weight.contiguous()
        return Totals.of(target, weight, self), weight

    def divisor(self, prepared: Prepared) -> Tensor | None:
        return prepared[0].divisor(self)

    def outputs(self, target: Tensor, dtype: torch.dtype) -> CrossEntropyRows:
        return CrossEntropyRows.empty(target, dtype, self)

    def step(
        self,
        logits: Tensor,
        teacher: Tensor | None,
        target: Tensor,
        prepared: Prepared,
        *,
        out: RowOutputs,
        grad: Tensor | None = None,
        row_scale: Tensor | None = None,
        padded: bool = False,
    ) -> None:
        totals, weight = prepared
        kernels_of("cross_entropy", logits).step(
            logits,
            target,
            weight,
            totals=totals,
            options=self,
            out=out,
            grad=grad,
            row_scale=row_scale,
            padded=padded,
        )

    def of_logits(
        self, logits: Tensor, teacher: Tensor | None, target: Tensor, class_weight: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        return reference.terms(logits, target, class_weight, **self.named())

    def reduced(self, out: RowOutputs, prepared: Prepared) -> tuple[Tensor | None, ...]:
        assert isinstance(out, CrossEntropyRows)
        return out.reduced(self, prepared[0])

    def output_likes(self, target: Tensor, dtype: torch.dtype) -> list[tuple[Any, torch.dtype]]:
        shape: Any = target.shape if self.reduction == "none" else ()
        return [
            (shape, dtype),
            (shape if self.return_z_loss else None, dtype),
            (shape if self.return_token_accuracy else None, torch.float32),
            (target.shape if self.return_predicted_tokens else None, torch.int64),
        ]
