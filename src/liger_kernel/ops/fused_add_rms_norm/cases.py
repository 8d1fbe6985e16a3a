"""Inputs of add + RMSNorm for tests and benchmarks."""

from __future__ import annotations

from typing import Any

from liger_kernel.ops.fused_add_rms_norm import fused_add_rms_norm, reference
from liger_kernel.testing import Make, OpCase, OpSpec

DEFAULTS = {"eps": 1e-6, "offset": 0.0, "casting_mode": "llama"}


def _case(
    id: str,
    why: str,
    rows: int,
    hidden: int,
    large: bool = False,
    unused: tuple[int, ...] = (),
    **options: Any,
) -> OpCase:
    return OpCase(
        id,
        why,
        lambda make: (make.randn(rows, hidden), make.randn(rows, hidden), make.randn(hidden)),
        {**DEFAULTS, **options},
        bytes_moved=lambda size: 8 * rows * hidden * size,
        large=large,
        outputs_without_grad=unused,
    )


def _shaped(id: str, why: str, make_x: Any, make_residual: Any, hidden: int | None) -> OpCase:
    def inputs(make: Make) -> tuple[Any, ...]:
        return make_x(make), make_residual(make), None if hidden is None else make.randn(hidden)

    return OpCase(id, why, inputs, DEFAULTS)


SPEC = OpSpec(
    name="fused_add_rms_norm",
    function=fused_add_rms_norm,
    reference=reference.fused_add_rms_norm,
    differentiable=(0, 1, 2),
    cases=(
        _case("llama", "several tiles of several rows, odd row count", 37, 96),
        _case("gemma", "offset 1, one rounding", 9, 64, offset=1.0, casting_mode="gemma"),
        _case("none", "no promised fp32 statistics", 5, 48, casting_mode="none"),
        _case("only-y", "the sum is not used: no gradient for it", 9, 64, unused=(1,)),
        _case("only-sum", "the norm is not used: its weight gets no gradient", 9, 64, unused=(0,)),
        _case("one-row", "one row, odd width", 1, 333),
        _case("no-rows", "empty batch", 0, 32),
        _case("wide-row", "a row that the backward keeps beside one running sum", 3, 8192 + 40),
        _case("long-row", "a row that the backward reads twice", 2, 16384 + 40),
        _case("eps", "an eps that decides", 5, 48, eps=0.5),
        _case("longer-row", "a row whose backward takes two kernels", 3, 24576 + 40),
        _shaped(
            "views",
            "a strided and a transposed view",
            lambda m: m.strided(6, 40),
            lambda m: m.transposed(6, 40),
            40,
        ),
        _shaped(
            "expanded",
            "stride 0, three dimensions",
            lambda m: m.expanded(6, 3, 40),
            lambda m: m.randn(6, 3, 40),
            40,
        ),
        _shaped(
            "no-weight", "no affine part", lambda m: m.randn(5, 64), lambda m: m.randn(5, 64), None
        ),
        _case("8192x4096", "Llama-3-8B hidden states", 8192, 4096, large=True),
        _case("16384x2048", "Llama-3.2-1B hidden states", 16384, 2048, large=True),
    ),
)
