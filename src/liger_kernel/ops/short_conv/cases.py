"""Inputs of the gated short convolution for tests and benchmarks."""

from __future__ import annotations

from typing import Any

from liger_kernel.ops.short_conv import reference, short_conv
from liger_kernel.testing import Inputs, Make, OpSpec, case


def of(*tokens: int, c: int, k: int = 3, bias: bool = False, draw: Any = Make.randn) -> Inputs:
    return lambda make: (
        draw(make, *tokens, 3 * c),
        make.randn(c, k, scale=0.5),
        make.randn(c) if bias else None,
    )


CASES = (
    case("batch", "sequences that end within a tile of tokens", of(3, 7, c=40)),
    case("bias", "four taps, two tiles of channels", of(2, 5, c=260, k=4, bias=True)),
    case("short", "sequences shorter than the taps", of(2, 2, 2, c=8, k=4)),
    case("one-tap", "no other token; no batch", of(5, c=17, k=1, bias=True)),
    case("strided", "part of a wider projection", of(2, 7, c=16, draw=Make.strided)),
    case("no-tokens", "sequences of no token: gradients of zero", of(2, 0, c=8, bias=True)),
    case("no-rows", "empty batch: gradients of zero", of(0, 4, c=8)),
    case("4x4096x2048", "LFM2-1.2B", of(4, 4096, c=2048), large=True),
    case("8x4096x1024", "LFM2-350M", of(8, 4096, c=1024), large=True),
)
SPEC = OpSpec(
    name="short_conv",
    function=short_conv,
    reference=reference.short_conv,
    cases=CASES,
    differentiable=(0, 1, 2),
    traffic=(11 / 3, (0,)),
)
