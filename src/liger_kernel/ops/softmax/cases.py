"""Inputs of the softmax for tests and benchmarks."""

from __future__ import annotations

from typing import Any

from liger_kernel.ops.softmax import reference, softmax
from liger_kernel.testing import Inputs, Make, OpSpec, case


def of(*shape: int, draw: Any = Make.randn, scale: float = 3.0, **how: float) -> Inputs:
    return lambda make: (draw(make, *shape, scale=scale, **how),)


def _masked(make: Make) -> Any:
    """-inf in every row, in one of them all but one, and in one the whole first block of the kernel."""
    x = make.randn(4, 32768 + 40)
    x[:, ::3] = float("-inf")
    x[1, :-1] = float("-inf")
    x[2, :32768] = float("-inf")
    return (x,)


CASES = (
    case("rows", "several tiles of several rows, odd row count", of(67, 96)),
    case("one-column", "gradient 0", of(5, 1)),
    case("one-row", "one row, odd width", of(1, 333)),
    case("vector", "one dimension", of(333)),
    case("no-rows", "empty batch", of(0, 32)),
    case("4d", "attention scores", of(2, 3, 4, 24)),
    case("long-row", "a row that the backward reads twice", of(3, 16384 + 40)),
    case("longer-row", "a row that both read twice, in more than two blocks", of(2, 65536 + 7)),
    case("masked", "-inf alone and in whole blocks", _masked),
    case(
        "shared-row", "a row that eight programs share, the last a shorter part", of(2, 65536 + 48)
    ),
    case("strided", "row stride larger than the row", of(6, 40, draw=Make.strided)),
    case("long-strided", "likewise, at both reads", of(2, 32768 + 8, draw=Make.strided)),
    case("transposed", "last dimension not contiguous", of(6, 40, draw=Make.transposed)),
    case("expanded", "stride 0", of(6, 40, draw=Make.expanded)),
    case("equal", "every probability 1 / V", of(5, 300, scale=0.0, shift=7.0)),
    case("huge-values", "exp overflows without the shift", of(5, 300, scale=1e4)),
    case("8192x8192", "the usual benchmark size", of(8192, 8192), large=True),
    case("65536x1024", "attention scores of short sequences", of(65536, 1024), large=True),
    case("4096x32768", "the longest row that one block holds", of(4096, 32768), large=True),
    case("4096x128256", "the vocabulary of Llama-3", of(4096, 128256), large=True),
)
SPEC = OpSpec(
    name="softmax",
    function=softmax,
    reference=reference.softmax,
    cases=CASES,
    differentiable=(0,),
    traffic=(5, (0,)),
)
