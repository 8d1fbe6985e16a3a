"""Inputs of PolyNorm for tests and benchmarks."""

from __future__ import annotations

from typing import Any

from liger_kernel.ops.poly_norm import poly_norm, reference
from liger_kernel.testing import Inputs, Make, OpSpec, case


def of(*shape: int, draw: Any = Make.randn, **how: float) -> Inputs:
    return lambda make: (draw(make, *shape, **how), make.randn(3), make.randn(1)[0])


def _views(make: Make) -> Any:
    return make.randn(6, 40), make.randn(6)[::2], make.randn(3)[1:2]


CASES = (
    case("rows", "several tiles of several rows, odd row count", of(67, 96)),
    case("two-columns", "the shortest row whose gradient is not zero", of(5, 2)),
    case("one-row", "one row, odd width", of(1, 333)),
    case("vector", "one dimension", of(333)),
    case("no-rows", "empty batch: gradients of zero, not of garbage", of(0, 32)),
    case("4d", "more dimensions", of(2, 3, 4, 16), eps=1e-5),
    case("long-row", "a row that is read several times", of(3, 16384 + 40)),
    case("longer-row", "in many blocks", of(2, 65536 + 7)),
    case("strided", "row stride larger than the row", of(6, 40, draw=Make.strided)),
    case("long-strided", "likewise, at every read", of(2, 16384 + 8, draw=Make.strided)),
    case("transposed", "last dimension not contiguous", of(6, 40, draw=Make.transposed)),
    case("expanded", "stride 0", of(6, 40, draw=Make.expanded)),
    case("parameter-views", "a weight with gaps, a bias of shape (1,)", _views),
    case("tiny-values", "eps dominates", of(8, 64, scale=1e-4)),
    case("zeros", "nothing but eps", of(5, 64, scale=0.0)),
    case("large-values", "sixth powers far beyond float16", of(8, 64, scale=1e4)),
    case("8192x4096", "the usual benchmark size", of(8192, 4096), large=True),
    case("8192x14336", "the intermediate size of Llama-3-8B", of(8192, 14336), large=True),
    case("65536x1024", "short rows", of(65536, 1024), large=True),
)
SPEC = OpSpec(
    name="poly_norm",
    function=poly_norm,
    reference=reference.poly_norm,
    cases=CASES,
    differentiable=(0, 1, 2),
    defaults={"eps": 1e-6},
    traffic=(5, (0,)),
)
