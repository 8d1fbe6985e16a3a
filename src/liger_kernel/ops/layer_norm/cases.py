"""Inputs of LayerNorm for tests and benchmarks."""

from __future__ import annotations

from typing import Any

from liger_kernel.ops.layer_norm import layer_norm, reference
from liger_kernel.testing import Inputs, Make, OpSpec, case


def of(
    *shape: int, draw: Any = Make.randn, weight: bool = True, bias: bool = True, **how: float
) -> Inputs:
    def inputs(make: Make) -> Any:
        affine = (make.randn(shape[-1]) if wanted else None for wanted in (weight, bias))
        return draw(make, *shape, **how), *affine

    return inputs


def _views(make: Make) -> Any:
    return make.randn(6, 40), make.randn(80)[::2], make.randn(1).expand(40)


CASES = (
    case("affine", "several tiles of several rows, odd row count", of(37, 96)),
    case("no-bias", "as Cohere's", of(9, 64, bias=False)),
    case("no-weight", "a bias alone", of(9, 64, weight=False)),
    case("plain", "no affine part", of(9, 64, weight=False, bias=False)),
    case("three-columns", "the shortest row whose gradient is not zero", of(5, 3)),
    case("one-row", "one row, odd width", of(1, 333)),
    case("no-rows", "empty batch: gradients of zero, not of garbage", of(0, 32)),
    case("long-row", "a row that the backward reads twice", of(2, 16384 + 40)),
    case("longer-row", "a row whose backward takes two kernels", of(3, 24576 + 40)),
    case("4d", "more dimensions", of(2, 3, 4, 16)),
    case("strided", "row stride larger than the row", of(6, 40, draw=Make.strided)),
    case("long-strided", "likewise, at both reads", of(3, 16384 + 8, draw=Make.strided)),
    case("transposed", "last dimension not contiguous", of(6, 40, draw=Make.transposed)),
    case("expanded", "stride 0", of(6, 40, draw=Make.expanded)),
    case("parameter-views", "a weight with gaps, a bias with stride 0", _views),
    case("far-mean", "one-pass variance would cancel", of(64, 60, shift=100)),
    case("tiny-values", "eps dominates", of(4, 64, scale=1e-4), eps=1e-6),
    case("8192x4096", "the usual benchmark size", of(8192, 4096), large=True),
    case("16384x2048", "a smaller model", of(16384, 2048), large=True),
    case("8192x16384", "the widest row that one block holds", of(8192, 16384), large=True),
    case("2048x32768", "a very long row", of(2048, 32768), large=True),
)
SPEC = OpSpec(
    name="layer_norm",
    function=layer_norm,
    reference=reference.layer_norm,
    cases=CASES,
    differentiable=(0, 1, 2),
    defaults={"eps": 1e-5},
    traffic=(5, (0,)),
)
