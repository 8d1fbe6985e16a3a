"""Inputs of the dynamic tanh for tests and benchmarks."""

from __future__ import annotations

from typing import Any

from liger_kernel.ops.dyt import dyt, reference
from liger_kernel.testing import Inputs, Make, OpSpec, case


def of(
    *shape: int, draw: Any = Make.randn, beta: bool = True, alpha: float = 0.5, **how: float
) -> Inputs:
    def inputs(make: Make) -> Any:
        parameters = make.randn(shape[-1]), make.randn(shape[-1]) if beta else None
        return draw(make, *shape, **how), make.randn(1, scale=0.0, shift=alpha), *parameters

    return inputs


def _views(make: Make) -> Any:
    """alpha without dimensions, a gamma with gaps, a beta with stride 0."""
    gamma, beta = make.randn(80)[::2], make.randn(1).expand(40)
    return make.randn(6, 40), make.randn(1)[0], gamma, beta


CASES = (
    case("rows", "several tiles, odd row count", of(1100, 96)),
    case("no-beta", "gamma alone", of(9, 64, beta=False)),
    case("wide", "several tiles of columns, the last one partly masked", of(37, 2048 + 40)),
    case("one-column", "the shortest row", of(5, 1)),
    case("one-row", "one row, odd width", of(1, 333)),
    case("vector", "no row at all", of(333)),
    case("no-rows", "empty batch: gradients of zero, not of garbage", of(0, 32)),
    case("4d", "more dimensions", of(2, 3, 4, 16)),
    case("strided", "row stride larger than the row", of(6, 40, draw=Make.strided)),
    case("transposed", "last dimension not contiguous", of(6, 40, draw=Make.transposed)),
    case("expanded", "stride 0", of(6, 40, draw=Make.expanded)),
    case("parameter-views", "any strides, alpha of shape ()", _views),
    case("tiny-values", "tanh(u) is u", of(8, 64, scale=1e-4, beta=False)),
    case("small-values", "both branches of tanh", of(64, 64, scale=1.1, alpha=-0.5, beta=False)),
    case("huge-values", "tanh is 1, its slope 0", of(8, 64, scale=1e4)),
    case("8192x4096", "the usual benchmark size", of(8192, 4096), large=True),
    case("16384x1024", "vision transformers", of(16384, 1024), large=True),
    case("8192x16384", "wide rows", of(8192, 16384), large=True),
)
SPEC = OpSpec(
    name="dyt",
    function=dyt,
    reference=reference.dyt,
    cases=CASES,
    differentiable=(0, 1, 2, 3),
    traffic=(5, (0,)),
)
