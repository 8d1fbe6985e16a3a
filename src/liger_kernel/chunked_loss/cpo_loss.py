"""CPO (arXiv 2401.08417): DPO without a reference model, with the NLL of the chosen tokens."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from liger_kernel._core.declared import LossFunction, takes
from liger_kernel.chunked_loss.preference import PairLoss, PairOptions, smoothed_sigmoid_loss


@dataclass(frozen=True)
class CPOOptions(PairOptions):
    """label_smoothing: the share of pairs that are taken to be labelled the wrong way round."""

    ignore_index: int = -100
    beta: float = 0.1
    alpha: float = 1.0
    label_smoothing: float = 0.0
    compute_nll_loss: bool = True
    compiled: bool = True
    average_log_prob: bool = False
    chunk_size: int = 1


def pair_loss(
    options: CPOOptions, chosen: Tensor, rejected: Tensor, *_: Tensor
) -> tuple[Tensor, ...]:
    beta = options.beta
    loss = smoothed_sigmoid_loss(beta * (chosen - rejected), options.label_smoothing)
    return loss, beta * chosen, beta * rejected


class LigerFusedLinearCPOLoss(PairLoss):
    """CPO: `-log sigmoid(beta * (chosen - rejected))` of log-probabilities, plus `alpha` times the chosen's NLL."""

    formula = staticmethod(pair_loss)

    @takes(CPOOptions)
    def __init__(self) -> None: ...


class LigerFusedLinearCPOFunction(LossFunction, loss=LigerFusedLinearCPOLoss): ...
