"""Inputs of a Linear with an adapter for tests and benchmarks."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from liger_kernel.ops.lora_linear import lora_linear, reference
from liger_kernel.testing import Make, OpCase, OpSpec, case


def _case(
    id: str,
    why: str,
    shape: tuple[int, ...],
    n_out: int,
    rank: int,
    draw: Any = Make.randn,
    bias: bool = False,
    wide: bool = False,
    **options: Any,
) -> OpCase:
    """x of `shape`; `wide`: an adapter in fp32 beneath a base of 16 bits."""
    *leading, n_in = shape
    flops = 4 * math.prod(leading) * (n_in * n_out + rank * (n_in + n_out))

    def inputs(make: Make) -> tuple[Tensor | None, ...]:
        weight = make.randn(n_out, n_in, scale=n_in**-0.5)
        a = make.randn(rank, n_in, scale=n_in**-0.5)
        b = make.randn(n_out, rank, scale=rank**-0.5)
        if wide:
            a, b = a.float(), b.float()
        return draw(make, *shape), weight, make.randn(n_out) if bias else None, a, b

    return case(id, why, inputs, flops=flops, **options)


CASES = (
    _case("odd", "odd sizes", (37, 24), 41, 3, scaling=2.0),
    _case("tiles", "several spans of rows, and tiles of columns", (130, 16), 300, 5),
    _case("bias", "Qwen2's attention", (9, 16), 24, 4, bias=True, scaling=0.5),
    _case("wide-adapter", "PEFT's default for a base of 16 bits", (9, 16), 24, 4, wide=True),
    _case("one-row", "one row, rank 1", (1, 16), 24, 1),
    _case("no-rows", "empty batch: gradients of zero, not of garbage", (0, 16), 24, 4),
    _case("3d", "a batch of sequences", (2, 3, 16), 24, 4),
    _case("vector", "one dimension", (16,), 24, 4),
    _case("strided", "rows with gaps", (6, 16), 24, 4, Make.strided),
    _case("transposed", "columns first", (6, 16), 24, 4, Make.transposed),
    _case("expanded", "stride 0", (6, 16), 24, 4, Make.expanded),
    _case("8192x4096x4096", "o_proj of Llama-3-8B", (8192, 4096), 4096, 16, large=True),
    _case("8192x4096x14336", "gate_proj of Llama-3-8B", (8192, 4096), 14336, 16, large=True),
)
SPEC = OpSpec(
    name="lora_linear",
    function=lora_linear,
    reference=reference.lora_linear,
    cases=CASES,
    differentiable=(0, 1, 2, 3, 4),
    defaults={"scaling": 1.0},
)
