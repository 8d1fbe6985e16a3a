"""Pairs of distributions for tests and benchmarks of the three."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from liger_kernel.testing import Inputs, Make, OpCase, case


def pair(
    rows: int,
    classes: int,
    *,
    logs: tuple[bool, bool] = (True, True),
    ignored: float | None = None,
    ignore_index: int = -100,
    draw: Any = None,
    scale: float = 2.0,
    zeros: str = "",
    apart: float = 1.0,
) -> Inputs:
    """The distribution that is trained ("x") and the fixed one ("y"), as logarithms or as probabilities (`logs`).

    ignored: share of the labels; None for no labels. zeros: which of the two have classes of probability 0, "x", "y" or
    "xy". apart: how different they are; 0 for equal. With `draw`, any numbers: the formulas hold for them, too.
    """

    def inputs(make: Make) -> tuple[Tensor, ...]:
        labels = () if ignored is None else (make.labels(rows, classes, ignored, ignore_index),)
        if draw is not None:
            return draw(make, rows, classes), draw(make, rows, classes), *labels
        common = make.randn(rows, classes, scale=scale)
        found = []
        for is_log, name in zip(logs, "xy", strict=True):
            logits = common + make.randn(rows, classes, scale=scale) * apart
            if name in zeros:
                logits[make.integers(3, rows, classes) == 0] = -torch.inf
            found.append(logits.log_softmax(-1) if is_log else logits.softmax(-1))
        return *found, *labels

    return inputs


def shapes(of: Callable[..., Inputs]) -> tuple[OpCase, ...]:
    """The cases that all three have; `of(rows, classes, **how)` is `pair` with what is common to those of an op."""
    return (
        case("odd", "the usual call: rows and classes that fill no tile", of(37, 301)),
        case("long-row", "a row that several programs share", of(3, 8192 + 57)),
        case("one-row", "one row", of(1, 129)),
        case("one-class", "certain: the only class", of(5, 1)),
        case("no-rows", "empty batch: loss 0", of(0, 32)),
        case("equal", "no distance: gradient of a divergence at its minimum", of(5, 70, apart=0)),
        case("strided", "row stride larger than the row", of(6, 90, draw=Make.strided)),
        case("transposed", "last dimension not contiguous", of(6, 90, draw=Make.transposed)),
        case("expanded", "stride 0", of(6, 90, draw=Make.expanded)),
        case("4096x128256", "Llama 3", of(4096, 128256), large=True),
        case("8192x32000", "Llama 2", of(8192, 32000), large=True),
        case("16x128256", "few rows: many programs share one", of(16, 128256), large=True),
        case("4096x151937", "rows that are no whole vectors", of(4096, 151937), large=True),
        case("20000x128256", "> 2^31 elements", of(20000, 128256), large=True),
    )


def labelled(of: Callable[..., Inputs]) -> tuple[OpCase, ...]:
    """Those of the ops that take labels."""
    one = of(12, 5, ignored=0.3, ignore_index=1)
    half = of(4096, 128256, ignored=0.5)
    return (
        case("ignored", "rows that count for nothing", of(23, 130, ignored=0.4)),
        case("all-ignored", "no division by zero, gradient 0", of(4, 45, ignored=1.0)),
        case("no-rows-labelled", "empty batch with labels", of(0, 32, ignored=0.5)),
        case("ignore-class-1", "a class; 1 is special to Triton", one, ignore_index=1),
        case("4096x128256-ignored50", "half of the rows only get zeros", half, large=True),
    )
