"""Total variation distance in plain PyTorch: the specification."""

from __future__ import annotations

from torch import Tensor

from liger_kernel.ops.divergences.reference import divergence


def tvd(
    p: Tensor,
    q: Tensor,
    shift_labels: Tensor | None = None,
    count: Tensor | None = None,
    *,
    reduction: str = "batchmean",
    ignore_index: int = -100,
) -> Tensor:
    """|p - q| / 2; its derivative is 0 where p = q."""

    def terms(p: Tensor, q: Tensor) -> Tensor:
        return (p - q).abs() / 2

    return divergence(terms, p, q, shift_labels, count, reduction, ignore_index)
