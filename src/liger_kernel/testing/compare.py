"""The only tolerance in the project."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from liger_kernel._core.tolerance import excess
from liger_kernel.backends import facts_of

#: with a larger ratio of error to allowed error, more draws are taken: it may be the luck of a few numbers
CLOSE = 0.7
#: with a larger one after sixteen draws it is not, and no more are taken
WRONG = 4.0
Results = Mapping[str, Tensor]


def assert_no_worse(
    name: str,
    ours: Tensor,
    high: Tensor,
    low: Tensor | Sequence[Tensor],
    *,
    elementwise: bool = False,
) -> None:
    """Fail unless `ours` is about as close to the truth as PyTorch eager is.

    `high` is the reference in float64 on the same, already rounded inputs; `low` is the same maths as PyTorch runs it
    in the dtype under test. With eps the spacing of `ours.dtype` at 1:

        max|ours - high| <= 2 (max|low - high| + eps max|high|),   and the same for the root mean square.

    With `elementwise` (per-token losses) every element must satisfy
    |ours - high| <= 2 (max|low - high| + eps |high|), so that one huge loss does not excuse the others.
    `low` may be several runs that sum in other orders: the largest of their errors counts. Integers must be equal.

    NaNs and infinities of `high` must be those of `ours`, in place and sign, and `ours` has no others. Where `high` is
    finite but beyond the largest number of `ours.dtype`, that number and infinity are both right. Where `low` is not
    finite and `high` is, that element of `low` allows nothing: `ours` has to do with what the others allow.

    A scalar or a short vector is not judged by one draw, which either side may round well by luck:
    `assert_draws_no_worse`. With a file name in LIGER_KERNEL_RATIOS every ratio of error to allowed error is written
    down; `python -m tests.ratios` prints the largest.
    """
    lows = [low] if isinstance(low, Tensor) else list(low)
    assert ours.shape == high.shape, f"{name}: shape {tuple(ours.shape)} != {tuple(high.shape)}"
    if ours.is_floating_point():
        assert ours.dtype == lows[0].dtype, f"{name}: dtype {ours.dtype} != {lows[0].dtype}"
    # where float64 is fast, and always there: 2^27 elements take a CPU half a minute
    device = ours.device if facts_of(ours.device).float64 else torch.device("cpu")
    ours, high, *lows = (t.detach().to(device) for t in (ours, high, *lows))
    ratio = excess(ours, high, lows, elementwise=elementwise)
    _record(name, ratio, ours.numel())
    if not ratio <= 1:
        error, allowed = ((t.double() - high.double()).abs() for t in (ours, lows[0]))
        worst = int((error / (1 + high.double().abs()) if elementwise else error).argmax())
        raise AssertionError(
            f"{name}: error is {ratio:.3g} of what is allowed; element {worst} of {error.numel()} is "
            f"{ours.flatten()[worst]:.9g}, truth {high.flatten()[worst]:.9g}"
            f"; eager is off by up to {allowed.max():.3g}"
        )


def assert_draws_no_worse(
    draw: Callable[[int], Sequence[Results]],
    first: int = 1,
    last: int = 64,
    elementwise: Sequence[str] = (),
) -> None:
    """`assert_no_worse` on several draws together; `draw(seed)` returns `ours`, `high` and `low` by name.

    It starts with `first` draws; a comparison that is CLOSE to what is allowed is judged on four times as many, up to
    `last`. That converges: an error that is larger than allowed stays so, one that was bad luck does not.
    """
    draws: list[list[Results]] = []
    names: Iterable[str] = []
    while names or not draws:
        for seed in range(len(draws), min(last, max(first, 4 * len(draws)))):
            runs = draw(seed)
            names = names or runs[0].keys()
            given = runs[0].keys()
            for run in runs:
                assert run.keys() == given, f"only in one run: {sorted(run.keys() ^ given)}"
            draws.append([{name: run[name] for name in names} for run in runs])
        close = []
        for name in names:
            ours, high, low = (torch.stack([runs[i][name] for runs in draws]) for i in range(3))
            by_element = name in elementwise
            ratio = excess(ours, high, low, elementwise=by_element)
            most = min(last, 16) if ratio > WRONG else last
            if len(draws) < most and ratio > CLOSE:
                close.append(name)
            else:
                assert_no_worse(name, ours, high, low, elementwise=by_element)
        names = close
        draws = [[{name: run[name] for name in names} for run in runs] for runs in draws]


def _record(name: str, ratio: float, numbers: int) -> None:
    """One line in a file of this process: the workers of a run do not share one."""
    if path := os.environ.get("LIGER_KERNEL_RATIOS"):
        test = os.environ.get("PYTEST_CURRENT_TEST", "").removesuffix(" (call)")
        with Path(f"{path}.{os.getpid()}").open("a") as file:
            file.write(json.dumps([ratio, test, name, numbers]) + "\n")
