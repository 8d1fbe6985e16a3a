"""Inputs of the product of int8 with packed 2-bit integers for tests and benchmarks."""

from __future__ import annotations

from typing import Any

import torch

from liger_kernel.ops.mm_int8int2 import mm_int8int2, reference
from liger_kernel.testing import Inputs, Make, OpSpec, case


def of(rows: int, terms: int, cols: int, turned: bool = False) -> Inputs:
    def inputs(make: Make) -> Any:
        shape = (terms, rows) if turned else (rows, terms)
        a = (make.integers(256, *shape) - 128).to(torch.int8)
        b = make.integers(256, terms // 4, cols).to(torch.uint8)
        return a.t() if turned else a, b

    return inputs


CASES = (
    case("odd", "tiles that are not full", of(67, 300, 131)),
    case("one-row", "a token", of(1, 64, 5)),
    case("no-rows", "empty batch", of(0, 64, 5)),
    case("no-terms", "zeros", of(3, 0, 5)),
    case("transposed", "terms are not contiguous", of(5, 36, 7, turned=True)),
    case("8192x4096x4096", "", of(8192, 4096, 4096), flops=2 * 8192 * 4096**2, large=True),
)
SPEC = OpSpec(
    name="mm_int8int2",
    function=mm_int8int2,
    reference=reference.mm_int8int2,
    cases=CASES,
    differentiable=(),
)
