"""Losses between two given distributions as modules."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from liger_kernel._core.declared import LossModule, takes
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
