"""The arithmetic of the one rule for numbers, which `liger_kernel.testing.assert_no_worse` states."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def excess(
    ours: Tensor,
    high: Tensor,
    low: Tensor | Sequence[Tensor],
    *,
    elementwise: bool = False,
    eps: float | None = None,
    factor: float = 2.0,
) -> float:
    """The error of `ours` over the error allowed: at most 1.0 where `ours` obeys the rule.

    `eps`: the spacing at 1, that of the dtype of `ours` if None. `factor`: 2 is the rule; patching also applies 1.

    Infinite where shapes, dtypes, integers, or the places and signs of NaNs and infinities differ.
    """
    lows = [low] if isinstance(low, Tensor) else list(low)
    dtype = ours.dtype
    if any(t.shape != high.shape or t.dtype != dtype for t in (ours, *lows)):
        return math.inf
    if not dtype.is_floating_point:
        return 0.0 if torch.equal(ours, high.to(dtype)) else math.inf
    info = torch.finfo(dtype)
    eps = info.eps if eps is None else eps
    ours, high, *lows = (t.detach().to(torch.float64) for t in (ours, high, *lows))
    beyond = high.isfinite() & high.to(dtype).isinf()
    if beyond.any():  # infinity and the largest number are both right there
        ours = torch.where(beyond, ours.clamp(-info.max, info.max), ours)
        high = torch.where(beyond, high.clamp(-info.max, info.max), high)
    judged = high.isfinite()
    if not judged.all():
        if not ((ours == high) | (ours.isnan() & high.isnan()) | judged).all():
            return math.inf
        ours, high, *lows = (t[judged] for t in (ours, high, *lows))
    if high.numel() == 0:
        return 0.0
    if not ours.isfinite().all():
        return math.inf
    error, size = (ours - high).abs(), high.abs()
    allowed = [(t - high).abs() for t in lows]
    allowed = [t[t.isfinite()] for t in allowed]  # an overflow of eager allows nothing
    ratios = []
    for reduce in (torch.amax, _rms):
        found = max((float(reduce(t)) for t in allowed if t.numel()), default=0.0)
        if elementwise:
            return float(_ratio(error, factor * (found + eps * size)).amax())
        ratios.append(_ratio(reduce(error), factor * (found + eps * reduce(size))))
    return max(map(float, ratios))


def _rms(t: Tensor) -> Tensor:
    return t.square().mean().sqrt()


def _ratio(error: Tensor, bound: Tensor) -> Tensor:
    return torch.where(error > 0, error / bound, 0.0)
