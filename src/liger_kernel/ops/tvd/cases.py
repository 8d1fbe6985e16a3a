"""Inputs of the total variation distance for tests and benchmarks."""

from __future__ import annotations

from functools import partial
from typing import Any

from liger_kernel.ops.divergences.cases import labelled, pair, shapes
from liger_kernel.ops.tvd import reference, tvd
from liger_kernel.testing import Make, OpSpec, case

of = partial(pair, logs=(False, False))
some = partial(of, ignored=0.3)
NONE: dict[str, Any] = {"reduction": "none"}
CASES = (
    *shapes(of),
    *labelled(of),
    case("mean", "divided by the terms of the rows that count", some(7, 130), reduction="mean"),
    case("sum", "not divided", some(7, 130), reduction="sum"),
    case("none", "a gradient arrives for each term", some(7, 130), **NONE),
    case("none-transposed", "likewise", some(7, 90, draw=Make.transposed), **NONE),
    case("none-long", "a row that several programs share", some(3, 8192 + 57), **NONE),
    case("4096x128256-none", "2 kernels", of(4096, 128256), large=True, **NONE),
)
SPEC = OpSpec(
    name="tvd",
    function=tvd,
    reference=reference.tvd,
    cases=CASES,
    differentiable=(0,),
    defaults={"reduction": "batchmean", "ignore_index": -100},
    traffic=(1, (0, 0, 1)),
)
