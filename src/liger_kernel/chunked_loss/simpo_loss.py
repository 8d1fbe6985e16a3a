"""SimPO (arXiv 2405.14734): mean log-probabilities, no reference model, a target margin."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from liger_kernel._core.declared import LossFunction, takes
from liger_kernel.chunked_loss.preference import PairLoss, PairOptions, smoothed_sigmoid_loss


@dataclass(frozen=True)
class SimPOOptions(PairOptions):
    """gamma: the margin by which the chosen sequence should win, after scaling by beta.
    label_smoothing: the share of pairs that are taken to be labelled the wrong way round."""

    ignore_index: int = -100
    beta: float = 0.1
    alpha: float = 1.0
    label_smoothing: float = 0.0
    compute_nll_loss: bool = True
    compiled: bool = True
    gamma: float = 0.5
    chunk_size: int = 1
    average_log_prob = True  # no option: it defines the loss


def pair_loss(
    options: SimPOOptions, chosen: Tensor, rejected: Tensor, *_: Tensor
) -> tuple[Tensor, ...]:
    beta = options.beta
    margin = beta * (chosen - rejected) - options.gamma
    return (
        smoothed_sigmoid_loss(margin, options.label_smoothing),
        beta * chosen,
        beta * rejected,
    )


class LigerFusedLinearSimPOLoss(PairLoss):
    """SimPO: `-log sigmoid(beta * (chosen - rejected) - gamma)` of mean log-probabilities; no reference model."""

    formula = staticmethod(pair_loss)

    @takes(SimPOOptions)
    def __init__(self) -> None: ...


class LigerFusedLinearSimPOFunction(
    LossFunction, loss=LigerFusedLinearSimPOLoss, compute_nll_loss=False
): ...
