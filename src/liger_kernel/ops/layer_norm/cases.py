"""Inputs of LayerNorm for tests and benchmarks."""

from __future__ import annotations

from typing import Any

from liger_kernel.ops.layer_norm import layer_norm, reference
from liger_kernel.testing import Make, OpCase, OpSpec


def _case(
    id: str,
    why: str,
    rows: int,
    hidden: int,
    large: bool = False,
    weight: bool = True,
    bias: bool = True,
) -> OpCase:
    def inputs(make: Make) -> tuple[Any, ...]:
        affine = (make.randn(hidden) if wanted else None for wanted in (weight, bias))
        return make.randn(rows, hidden), *affine

    return OpCase(
        id,
        why,
        inputs,
        {"eps": 1e-5},
        bytes_moved=lambda size: 5 * rows * hidden * size,
        large=large,
    )


def _shaped(id: str, why: str, make_x: Any, hidden: int) -> OpCase:
    return OpCase(id, why, lambda m: (make_x(m), m.randn(hidden), m.randn(hidden)), {"eps": 1e-6})


SPEC = OpSpec(
    name="layer_norm",
    function=layer_norm,
    reference=reference.layer_norm,
    differentiable=(0, 1, 2),
    cases=(
        _case("affine", "several tiles of several rows, odd row count", 37, 96),
        _case("no-bias", "as Cohere's", 9, 64, bias=False),
        _case("no-weight", "a bias alone", 9, 64, weight=False),
        _case("plain", "no affine part", 9, 64, weight=False, bias=False),
        _case("three-columns", "the shortest row whose gradient is not zero", 5, 3),
        _case("one-row", "one row, odd width", 1, 333),
        _case("no-rows", "empty batch: gradients of zero, not of garbage", 0, 32),
        _case("long-row", "a row that the backward reads twice", 2, 16384 + 40),
        _case("longer-row", "a row whose backward takes two kernels", 3, 24576 + 40),
        _shaped("4d", "more dimensions", lambda m: m.randn(2, 3, 4, 16), 16),
        _shaped("strided", "row stride larger than the row", lambda m: m.strided(6, 40), 40),
        _shaped(
            "long-strided",
            "likewise, at both reads of a row",
            lambda m: m.strided(3, 16384 + 8),
            16384 + 8,
        ),
        _shaped("transposed", "last dimension not contiguous", lambda m: m.transposed(6, 40), 40),
        _shaped("expanded", "stride 0", lambda m: m.expanded(6, 40), 40),
        OpCase(
            "parameter-views",
            "a weight with gaps, a bias with stride 0",
            lambda m: (m.randn(6, 40), m.randn(80)[::2], m.randn(1).expand(40)),
            {"eps": 1e-6},
        ),
        _shaped(
            "far-mean", "one-pass variance would cancel", lambda m: m.randn(64, 60, shift=100), 60
        ),
        _shaped("tiny-values", "eps dominates", lambda m: m.randn(4, 64, scale=1e-4), 64),
        _case("8192x4096", "the usual benchmark size", 8192, 4096, large=True),
        _case("16384x2048", "a smaller model", 16384, 2048, large=True),
        _case("8192x16384", "the widest row that one block holds", 8192, 16384, large=True),
        _case("2048x32768", "a very long row", 2048, 32768, large=True),
    ),
)
