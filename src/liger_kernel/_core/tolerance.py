"""The arithmetic of the project's one rule for numbers."""

from __future__ import annotations

from torch import Tensor


def excess(ours: Tensor, high: Tensor, low: Tensor, eps: float, factor: float = 2.0) -> float:
    """By how much `ours` is farther from the truth than the rule allows; it holds where this is not above 0.

    `high` is the truth, in float64 on the same rounded inputs; `low` is the same maths as PyTorch eager runs it:

        max|ours - high| <= factor * (max|low - high| + eps * max|high|),   and the same for the root mean square.

    NaN, which is not `<= 0` either, where one of them is not finite.
    """
    ours, high, low = (t.detach().double() for t in (ours, high, low))
    if high.numel() == 0:
        return 0.0
    error, allowed = (ours - high).abs(), (low - high).abs()
    high = high.abs()
    by_max = error.max() - factor * (allowed.max() + eps * high.max())
    by_rms = _rms(error) - factor * (_rms(allowed) + eps * _rms(high))
    return float(by_max.maximum(by_rms))


def _rms(t: Tensor) -> Tensor:
    return t.square().mean().sqrt()
