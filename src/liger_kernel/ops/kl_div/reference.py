"""KL divergence in plain PyTorch: the specification."""

from __future__ import annotations

from torch import Tensor

from liger_kernel.ops.divergences.reference import divergence, kl_terms


def kl_div(
    y_pred: Tensor,
    y_true: Tensor,
    target: Tensor | None = None,
    count: Tensor | None = None,
    *,
    reduction: str = "batchmean",
    log_target: bool = False,
    eps: float = 1e-10,
) -> Tensor:
    """With x = y_pred, y = y_true: y (log max(y, eps) - x), or exp(y) (y - x) where the target is logarithms too.

    A class of probability 0 adds 0. `target` is None: there are no labels here.
    """

    def terms(x: Tensor, y: Tensor) -> Tensor:
        if log_target:
            return kl_terms(y, x)
        return y * (y.clamp(min=eps).log() - x).masked_fill(y == 0, 0)

    return divergence(terms, y_pred, y_true, target, count, reduction)
