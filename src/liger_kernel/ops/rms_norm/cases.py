"""Inputs of RMSNorm for tests and benchmarks."""

from __future__ import annotations

from typing import Any

from liger_kernel.ops.rms_norm import reference, rms_norm
from liger_kernel.testing import Make, OpCase, OpSpec


def _case(id: str, why: str, rows: int, hidden: int, large: bool = False, **options: Any) -> OpCase:
    return OpCase(
        id,
        why,
        lambda make: (make.randn(rows, hidden), make.randn(hidden)),
        {"eps": 1e-6, "offset": 0.0, "casting_mode": "llama", **options},
        bytes_moved=lambda size: 5 * rows * hidden * size,
        large=large,
    )


def _shaped(id: str, why: str, make_x: Any, hidden: int | None, **options: Any) -> OpCase:
    def inputs(make: Make) -> tuple[Any, ...]:
        return make_x(make), None if hidden is None else make.randn(hidden)

    return OpCase(id, why, inputs, {"eps": 1e-5, "offset": 0.0, "casting_mode": "llama", **options})


SPEC = OpSpec(
    name="rms_norm",
    function=rms_norm,
    reference=reference.rms_norm,
    differentiable=(0, 1),
    cases=(
        _case("llama", "several tiles of several rows, odd row count", 37, 96),
        _case("gemma", "offset 1, one rounding", 9, 64, offset=1.0, casting_mode="gemma"),
        _case("none", "no promised fp32 statistics", 5, 48, casting_mode="none"),
        _case("llama-offset", "offset with the llama rounding", 7, 100, offset=1.0),
        _case("two-columns", "the shortest row whose gradient is not zero", 5, 2),
        _case("one-row", "one row, odd width", 1, 333),
        _case("no-rows", "empty batch: gradients of zero, not of garbage", 0, 32),
        _case("wide-row", "a row that the backward keeps beside one running sum", 3, 8192 + 40),
        _case("long-row", "a row that the backward reads twice", 3, 16384 + 40),
        _case(
            "long-row-gemma",
            "likewise, the offset at both reads",
            2,
            16384 + 8,
            offset=1.0,
            casting_mode="gemma",
        ),
        _case("longer-row", "a row whose backward takes two kernels", 3, 24576 + 40),
        _shaped("no-weight", "no affine part", lambda m: m.randn(3, 5, 64), None),
        _shaped("4d", "heads as in q/k norm", lambda m: m.randn(2, 3, 4, 16), 16),
        _shaped("strided", "row stride larger than the row", lambda m: m.strided(6, 40), 40),
        _shaped("transposed", "last dimension not contiguous", lambda m: m.transposed(6, 40), 40),
        _shaped("expanded", "stride 0", lambda m: m.expanded(6, 40), 40),
        OpCase(
            "weight-view",
            "a weight with gaps",
            lambda m: (m.randn(6, 40), m.randn(80)[::2]),
            {"eps": 1e-6, "offset": 0.0, "casting_mode": "llama"},
        ),
        _shaped("tiny-values", "eps dominates", lambda m: m.randn(4, 64, scale=1e-4), 64),
        _shaped(
            "large-values", "squares near the fp16 limit", lambda m: m.randn(4, 64, scale=200), 64
        ),
        _case("8192x4096", "Llama-3-8B hidden states", 8192, 4096, large=True),
        _case("16384x2048", "Llama-3.2-1B hidden states", 16384, 2048, large=True),
        _case("65536x128", "q/k norm of Qwen3", 65536, 128, large=True),
        _case("8192x16384", "Llama-3-405B hidden states", 8192, 16384, large=True),
        _case("2048x32768", "a very long row", 2048, 32768, large=True),
    ),
)
