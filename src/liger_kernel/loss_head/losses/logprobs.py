"""Log-probabilities and other numbers of a token as a row loss: `liger_kernel.ops.logprobs` does the step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from liger_kernel._core.rows import RowOutputs
from liger_kernel.backends import kernels_of
from liger_kernel.loss_head.row_loss import RowLoss
from liger_kernel.ops.logprobs import reference, step
from liger_kernel.ops.logprobs.contract import LogProbRows, LogProbsOptions


@dataclass(frozen=True)
class LogProbsLoss(LogProbsOptions, RowLoss):
    """Options: `LogProbsOptions`. Returns the columns of `LogProbRows`; `class_weight` are temperatures of rows."""

    name: ClassVar[str] = "logprobs"
    weighs_rows: ClassVar[bool] = True
    reduction = "none"  # no field: there is no other

    def prepare(self, target: Tensor, class_weight: Tensor | None) -> Tensor | None:
        return class_weight

    def of_rows(self, prepared: Tensor | None, rows: slice | Tensor) -> Tensor | None:
        return None if prepared is None else prepared[rows].contiguous()

    def divisor(self, prepared: Tensor | None) -> None:
        return None

    def outputs(self, target: Tensor, dtype: torch.dtype) -> LogProbRows:
        return LogProbRows.empty(target, dtype, self)

    def step(
        self,
        logits: Tensor,
        teacher: Tensor | None,
        target: Tensor,
        prepared: Tensor | None,
        *,
        out: RowOutputs,
        grad: Tensor | None = None,
        row_scale: Tensor | None = None,
        padded: bool = False,
    ) -> None:
        assert isinstance(out, LogProbRows)
        kernels = kernels_of("logprobs", logits)
        how: dict[str, Any] = {"grad": grad, "row_scale": row_scale, "padded": padded}
        step(kernels, logits, target, prepared, options=self, out=out, **how)

    def of_logits(
        self, logits: Tensor, teacher: Tensor | None, target: Tensor, class_weight: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        return reference.logprobs(logits, target, class_weight, **self.named())

    def reduced(self, out: RowOutputs, prepared: Tensor | None) -> tuple[Tensor | None, ...]:
        return out.columns

    def output_likes(self, target: Tensor, dtype: torch.dtype) -> list[tuple[Any, torch.dtype]]:
        return list(LogProbRows.likes(target, dtype, self))
