"""Inputs of neighbourhood attention for tests and benchmarks."""

from __future__ import annotations

from typing import Any

from liger_kernel.ops.fused_neighborhood_attention import fused_neighborhood_attention, reference
from liger_kernel.testing import Inputs, Make, OpSpec, case


def of(*shape: int, of_value: int | None = None, draw: Any = Make.randn) -> Inputs:
    *leading, size = shape
    return lambda make: (
        draw(make, *shape),
        draw(make, *shape),
        draw(make, *leading, of_value or size),
    )


CASES = (
    case("blocks", "three of them, the last one not full", of(2, 3, 77, 8)),
    case("one-block", "shorter than a block", of(1, 2, 9, 16), kernel_size=3),
    case("dilated", "classes of two lengths", of(1, 2, 71, 8), kernel_size=5, dilation=3),
    case("wide", "a window larger than the smallest block", of(1, 1, 150, 8), kernel_size=41),
    case("all", "a window larger than the sequence", of(1, 2, 20, 8), kernel_size=99),
    case("sparse", "nobody but the query itself", of(1, 1, 5, 8), kernel_size=3, dilation=7),
    case("even", "as the next odd size", of(1, 1, 40, 8), kernel_size=4, scale=0.5),
    case("itself", "a window of one: the value", of(1, 1, 40, 8), kernel_size=1),
    case("no-tokens", "empty", of(2, 2, 0, 8)),
    case("one-token", "gradient 0 for query and key", of(2, 2, 1, 8)),
    case("2d", "one sequence, wider values", of(40, 8, of_value=12)),
    case("strided", "slices of a projection", of(1, 2, 40, 8, draw=Make.strided)),
    case("8192", "32 heads of 128", of(1, 32, 8192, 128), kernel_size=7, large=True),
    case("8192-wide", "and a long window", of(1, 32, 8192, 128), kernel_size=257, large=True),
)
SPEC = OpSpec(
    name="fused_neighborhood_attention",
    function=fused_neighborhood_attention,
    reference=reference.fused_neighborhood_attention,
    cases=CASES,
    differentiable=(0, 1, 2),
    defaults={"kernel_size": 7, "dilation": 1, "scale": None},
    traffic=(4, (0, 1, 2)),
)
