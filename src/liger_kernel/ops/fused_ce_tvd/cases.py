"""Inputs of cross entropy with total variation distance for tests and benchmarks."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from liger_kernel.ops.fused_ce_tvd import fused_ce_tvd, reference
from liger_kernel.testing import Inputs, Make, OpSpec, case


def _logits(rows: int, classes: int, ignored: float = 0.0, *, draw: Any = Make.randn) -> Inputs:
    def inputs(make: Make) -> tuple[Tensor, ...]:
        x, y = (draw(make, rows, classes, scale=2.0) for _ in range(2))
        return x, y, make.labels(rows, classes, ignored)

    return inputs


CASES = (
    case("odd", "rows and classes that fill no block", _logits(7, 301, 0.3)),
    case("long-row", "several blocks, the last of them in parts", _logits(2, 8192 + 57)),
    case("one-class", "certain: nothing to learn", _logits(3, 1)),
    case("no-rows", "empty batch", _logits(0, 32)),
    case("all-ignored", "gradient 0", _logits(4, 45, 1.0)),
    case("strided", "row stride larger than the row", _logits(5, 90, draw=Make.strided)),
    case("transposed", "last dimension not contiguous", _logits(5, 90, draw=Make.transposed)),
    case("ignore-class-1", "a class; 1 is special to Triton", _logits(9, 5), ignore_index=1),
    case("4096x128256", "Llama 3", _logits(4096, 128256), large=True),
    case("20000x128256", "> 2^31 elements", _logits(20000, 128256), large=True),
)
SPEC = OpSpec(
    name="fused_ce_tvd",
    function=fused_ce_tvd,
    reference=reference.fused_ce_tvd,
    cases=CASES,
    differentiable=(0,),
    defaults={"ignore_index": -100},
    traffic=(1, (0, 1, 0, 1, 0)),
)
