"""Inputs of the squared ReLU for tests and benchmarks."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from liger_kernel.ops.relu_squared import reference, relu_squared
from liger_kernel.testing import Make, OpCase, OpSpec


def _case(id: str, why: str, *shape: int, large: bool = False) -> OpCase:
    def inputs(make: Make) -> tuple[Tensor | None, ...]:
        return (make.randn(*shape, scale=3),)

    def bytes_moved(size: int) -> int:
        elements = 1
        for n in shape:
            elements *= n
        return 5 * elements * size

    return OpCase(id, why, inputs, bytes_moved=bytes_moved, large=large)


def _made(id: str, why: str, inputs: Any) -> OpCase:
    return OpCase(id, why, inputs)


SPEC = OpSpec(
    name="relu_squared",
    function=relu_squared,
    reference=reference.relu_squared,
    differentiable=(0,),
    cases=(
        _case("rows", "two programs, the second one partly masked", 67, 96),
        _case("4d", "leading dimensions", 2, 3, 4, 24),
        _case("vector", "one dimension, odd", 333),
        _case("one-element", "no row at all", 1),
        _case("no-rows", "empty batch", 0, 32),
        _made("strided", "a slice of a wider projection", lambda m: (m.strided(6, 40),)),
        _made("transposed", "last dimension not contiguous", lambda m: (m.transposed(6, 40),)),
        _made("expanded", "stride 0", lambda m: (m.expanded(6, 40),)),
        _made("zeros", "the kink: gradient 0", lambda m: (m.randn(3, 20).clamp(min=0),)),
        _case("8192x24576", "Nemotron-4-15B", 8192, 24576, large=True),
        _case("16384x18432", "AFM-4.5B (Arcee)", 16384, 18432, large=True),
    ),
)
