"""Inputs of sparsemax for tests and benchmarks."""

from __future__ import annotations

from typing import Any

import torch

from liger_kernel.ops.sparsemax import reference, sparsemax
from liger_kernel.testing import Inputs, Make, OpSpec, case


def of(*shape: int, draw: Any = Make.randn, scale: float = 1.0, **how: float) -> Inputs:
    return lambda make: (draw(make, *shape, scale=scale, **how),)


def _ties(make: Make) -> Any:
    """Multiples of 1/4, among them values that are tau itself: outside the support."""
    x = make.integers(9, 40, 60).to(make.dtype) / 4
    x[0], x[0, 0] = 0, 1
    x[1], x[1, :4], x[1, 4:9] = -3, 0.5, 0.25
    return (x,)


def _masked(make: Make) -> Any:
    x = make.randn(4, 16384 + 40)
    x[:, ::3] = -torch.inf
    x[1, :-1] = -torch.inf
    x[2, :16384] = -torch.inf
    return (x,)


def _staircase(make: Make) -> Any:
    """Each Newton step takes one value out of the support: the most steps there can be."""
    x = -torch.pow(2.0, torch.arange(-23, 8, device=make.device)).flip(0)
    return (torch.stack([x, x.roll(5)]).to(make.dtype),)


CASES = (
    case("rows", "several tiles of several rows, odd row count", of(67, 96)),
    case("one-column", "y = 1, gradient 0", of(5, 1)),
    case("one-row", "one row, odd width", of(1, 333)),
    case("vector", "one dimension", of(333)),
    case("no-rows", "empty batch", of(0, 32)),
    case("4d", "leading dimensions", of(2, 3, 4, 24)),
    case("first-dimension", "not the last one", of(24, 3, 5), dim=0),
    case("middle-dimension", "not the last one either", of(2, 24, 5), dim=-2),
    case("long-row", "a row that is read once a step", of(3, 16384 + 40)),
    case("longer-row", "in more than two blocks", of(2, 65536 + 7)),
    case("dense", "thousands of values in the support", of(2, 16384 + 7, scale=1e-4)),
    case("masked", "-inf alone and in whole blocks", _masked),
    case("ties", "equal values, at tau too", _ties),
    case("staircase", "values of every size", _staircase),
    case("strided", "row stride larger than the row", of(6, 40, draw=Make.strided)),
    case("long-strided", "likewise, at every read", of(2, 16384 + 8, draw=Make.strided)),
    case("transposed", "last dimension not contiguous", of(6, 40, draw=Make.transposed)),
    case("expanded", "stride 0", of(6, 40, draw=Make.expanded)),
    case("equal", "all of the row is the support", of(5, 300, scale=0.0, shift=7.0)),
    case("huge-values", "one of each row", of(5, 300, scale=1e4)),
    case("4096x8192", "the usual benchmark size", of(4096, 8192), large=True),
    case("8192x16384", "the longest row that one block holds", of(8192, 16384), large=True),
    case("1024x128256", "the vocabulary of Llama-3", of(1024, 128256), large=True),
)
SPEC = OpSpec(
    name="sparsemax",
    function=sparsemax,
    reference=lambda x, dim: reference.sparsemax(x.transpose(dim, -1)).transpose(dim, -1),
    cases=CASES,
    differentiable=(0,),
    defaults={"dim": -1},
    traffic=(5, (0,)),
)
