"""Inputs of the squared ReLU for tests and benchmarks."""

from __future__ import annotations

from typing import Any

from liger_kernel.ops.relu_squared import reference, relu_squared
from liger_kernel.testing import Inputs, Make, OpSpec, case


def of(*shape: int, draw: Any = Make.randn) -> Inputs:
    return lambda make: (draw(make, *shape, scale=3),)


CASES = (
    case("rows", "two programs, the second one partly masked", of(67, 96)),
    case("4d", "leading dimensions", of(2, 3, 4, 24)),
    case("vector", "one dimension, odd", of(333)),
    case("one-element", "no row at all", of(1)),
    case("no-rows", "empty batch", of(0, 32)),
    case("strided", "a slice of a wider projection", of(6, 40, draw=Make.strided)),
    case("transposed", "last dimension not contiguous", of(6, 40, draw=Make.transposed)),
    case("expanded", "stride 0", of(6, 40, draw=Make.expanded)),
    case("zeros", "the kink: gradient 0", lambda m: (m.randn(3, 20).clamp(min=0),)),
    case("8192x24576", "Nemotron-4-15B", of(8192, 24576), large=True),
    case("16384x18432", "AFM-4.5B (Arcee)", of(16384, 18432), large=True),
)
SPEC = OpSpec(
    name="relu_squared",
    function=relu_squared,
    reference=reference.relu_squared,
    cases=CASES,
    differentiable=(0,),
    traffic=(5, (0,)),
)
