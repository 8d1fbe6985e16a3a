"""Losses between two distributions as modules: given ones, and softmaxes of linear layers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from liger_kernel._core.checks import check_choice
from liger_kernel._core.declared import LossModule, takes
from liger_kernel.loss_head import fused_linear_jsd as _jsd
from liger_kernel.loss_head import fused_linear_kl_div as _kl_div
from liger_kernel.loss_head.losses.jsd import JSDLoss
from liger_kernel.loss_head.losses.kl_div import KLDivLoss
from liger_kernel.ops.fused_ce_tvd import LigerFusedCETVDFunction
from liger_kernel.ops.fused_ce_tvd.contract import CETVDOptions
from liger_kernel.ops.jsd import LigerJSDFunction
from liger_kernel.ops.jsd.contract import JSDOptions
from liger_kernel.ops.kl_div import LigerKLDivLossFunction
from liger_kernel.ops.tvd import LigerTVDLossFunction
from liger_kernel.ops.tvd.contract import TVDOptions


class LigerKLDIVLoss(nn.KLDivLoss):
    """`torch.nn.KLDivLoss` by `liger_kernel.ops.kl_div`; its arguments (reduction "mean") follow `eps`."""

    def __init__(self, eps: float = 1e-10, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.eps = eps

    def forward(self, y_pred: Tensor, y_true: Tensor) -> Tensor:
        how = self.reduction, self.log_target, self.eps
        return LigerKLDivLossFunction.apply(y_pred, y_true, *how)


class LigerJSD(LossModule):
    """The generalised Jensen-Shannon divergence of log-probabilities: `liger_kernel.ops.jsd` with its options."""

    @takes(JSDOptions)
    def __init__(self) -> None: ...

    def forward(self, log_q: Tensor, log_p: Tensor, shift_labels: Tensor | None = None) -> Tensor:
        return LigerJSDFunction.apply(log_q, log_p, shift_labels, **self.chosen())


class LigerTVDLoss(LossModule):
    """The total variation distance of probabilities: `liger_kernel.ops.tvd` with its options."""

    @takes(TVDOptions)
    def __init__(self) -> None: ...

    def forward(self, p: Tensor, q: Tensor, shift_labels: Tensor | None = None) -> Tensor:
        return LigerTVDLossFunction.apply(p, q, shift_labels, **self.chosen())


class LigerFusedCETVDLoss(LossModule):
    """Cross entropy and total variation distance of logits, per row: `liger_kernel.ops.fused_ce_tvd`."""

    @takes(CETVDOptions)
    def __init__(self) -> None: ...

    def forward(
        self, student_logits: Tensor, teacher_logits: Tensor, target: Tensor
    ) -> tuple[Tensor, Tensor]:
        """student_logits, teacher_logits: (N, V). target: (N,). Returns the cross entropy and the distance (N,)."""
        return LigerFusedCETVDFunction.apply(
            student_logits, teacher_logits, target, **self.chosen()
        )


@dataclass(frozen=True)
class LinearJSDOptions:
    """jsd_beta: 0 is KL(teacher || student), 1 KL(student || teacher). temperature: divides the logits of both.
    ignore_index: the label of rows that do not count. accum_dtype: of the running sum of the weight's gradient.

    Raises: ValueError for a jsd_beta outside of [0, 1] or a temperature that is not positive."""

    jsd_beta: float = 0.5
    ignore_index: int = -100
    temperature: float = 1.0
    accum_dtype: torch.dtype | None = None

    def __post_init__(self) -> None:
        JSDLoss(temperature=self.temperature, beta=self.jsd_beta)


class LigerFusedLinearJSD(LossModule):
    """Two heads and the JSD of their softmaxes, without the logits: `liger_kernel.functional.fused_linear_jsd`."""

    @takes(LinearJSDOptions)
    def __init__(self) -> None: ...

    def forward(
        self,
        student_input: Tensor,
        student_weight: Tensor,
        teacher_input: Tensor,
        teacher_weight: Tensor,
        shift_labels: Tensor | None,
    ) -> Tensor:
        """student_input (N, Hs), student_weight (V, Hs), teacher_input (N, Ht), teacher_weight (V, Ht), labels (N,)."""
        tensors = student_input, student_weight, teacher_input, teacher_weight, shift_labels
        return _jsd.LigerFusedLinearJSDFunction.apply(*tensors, **self.chosen())


@dataclass(frozen=True)
class LinearKLDivOptions:
    """reduction: "batchmean", "mean" or "sum". ignore_index: the label of rows that do not count.
    temperature: divides the logits. eps: the least probability of which a logarithm is taken.
    accum_dtype: of the running sum of the weight's gradient.

    Raises: ValueError for another reduction or a temperature that is not positive."""

    reduction: str = "batchmean"
    ignore_index: int = -100
    temperature: float = 1.0
    eps: float = 1e-10
    accum_dtype: torch.dtype | None = None

    def __post_init__(self) -> None:
        check_choice("reduction", self.reduction, _kl_div.REDUCTIONS)
        KLDivLoss(temperature=self.temperature)


class LigerFusedLinearKLDivLoss(LossModule):
    """A head and the KL divergence from given probabilities: `liger_kernel.functional.fused_linear_kl_div`."""

    @takes(LinearKLDivOptions)
    def __init__(self) -> None: ...

    def forward(
        self,
        student_input: Tensor,
        student_weight: Tensor,
        target: Tensor,
        shift_labels: Tensor | None = None,
    ) -> Tensor:
        """student_input (N, H), student_weight (V, H), target (N, V) probabilities, labels (N,)."""
        tensors = student_input, student_weight, target, shift_labels
        return _kl_div.LigerFusedLinearKLDivFunction.apply(*tensors, **self.chosen())
