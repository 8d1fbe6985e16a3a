"""The only tolerance in the project."""

from __future__ import annotations

import torch
from torch import Tensor


def assert_no_worse(
    name: str, ours: Tensor, high: Tensor, low: Tensor, *, elementwise: bool = False
) -> None:
    """Fail unless `ours` is about as close to the truth as PyTorch eager is.

    `high` is the reference in float64 on the same, already rounded inputs; `low` is the same maths as PyTorch runs it
    in the dtype under test. With eps the spacing of `ours.dtype` at 1:

        max|ours - high| <= 2 (max|low - high| + eps max|high|),   and the same for the root mean square.

    With `elementwise` (per-token losses) every element must satisfy
    |ours - high| <= 2 (max|low - high| + eps |high|), so that one huge loss does not excuse the others.
    Integer tensors must be equal. Infinities must sit in the same places; a NaN in `ours` must be one in `high`.
    """
    assert ours.shape == high.shape, f"{name}: shape {tuple(ours.shape)} != {tuple(high.shape)}"
    if not ours.is_floating_point():
        assert torch.equal(ours.cpu(), high.to(ours.dtype).cpu()), f"{name}: integers differ"
        return
    assert ours.dtype == low.dtype, f"{name}: dtype {ours.dtype} != {low.dtype}"
    eps = torch.finfo(ours.dtype).eps
    # where float64 is fast, and always there: 2^27 elements take a CPU half a minute
    device = ours.device if ours.is_cuda else torch.device("cpu")
    ours, high, low = (t.detach().to(device, torch.float64) for t in (ours, high, low))
    finite = high.isfinite()
    assert torch.equal(ours[~finite], high[~finite]) or torch.equal(
        ours[~finite].isnan(), high[~finite].isnan()
    ), f"{name}: non-finite values differ"
    ours, high, low = ours[finite], high[finite], low[finite]
    if high.numel() == 0:
        return
    assert ours.isfinite().all(), f"{name}: {int((~ours.isfinite()).sum())} non-finite values"
    error, allowed = (ours - high).abs(), (low - high).abs()
    if elementwise:
        bound = 2 * (allowed.max() + eps * high.abs())
        worst = int((error - bound).argmax())
        assert error[worst] <= bound[worst], (
            f"{name}: element {worst} is {ours[worst]:.9g}, truth {high[worst]:.9g}; "
            f"error {error[worst]:.3g} > {bound[worst]:.3g}"
        )
        return
    for norm, reduce in (("max", torch.max), ("rms", lambda t: t.square().mean().sqrt())):
        bound = 2 * (reduce(allowed) + eps * reduce(high.abs()))
        found = reduce(error)
        assert found <= bound, f"{name}: {norm} error {found:.3g} > {bound:.3g}"
