"""Inputs of add + RMSNorm for tests and benchmarks."""

from __future__ import annotations

from typing import Any

from liger_kernel.ops.fused_add_rms_norm import fused_add_rms_norm, reference
from liger_kernel.testing import Inputs, Make, OpSpec, case


def of(*shape: int, x: Any = Make.randn, residual: Any = Make.randn, weight: bool = True) -> Inputs:
    def inputs(make: Make) -> Any:
        more = residual(make, *shape) if residual else None
        return x(make, *shape), more, make.randn(shape[-1]) if weight else None

    return inputs


CASES = (
    case("llama", "several tiles of several rows, odd row count", of(37, 96)),
    case("gemma", "offset 1, one rounding", of(9, 64), offset=1.0, casting_mode="gemma"),
    case("none", "no promised fp32 statistics", of(5, 48), casting_mode="none"),
    case("only-y", "the sum is not used: no gradient for it", of(9, 64), unused=(1,)),
    case("only-sum", "the norm is not used: its weight gets no gradient", of(9, 64), unused=(0,)),
    case("one-row", "one row, odd width", of(1, 333)),
    case("no-rows", "empty batch", of(0, 32)),
    case("wide-row", "a row that the backward keeps beside one running sum", of(3, 8192 + 40)),
    case("long-row", "a row that the backward reads twice", of(2, 16384 + 40)),
    case("eps", "an eps that decides", of(5, 48), eps=0.5),
    case("longer-row", "a row whose backward takes two kernels", of(3, 24576 + 40)),
    case("views", "odd strides", of(6, 40, x=Make.strided, residual=Make.transposed)),
    case("expanded", "stride 0, three dimensions", of(6, 3, 40, x=Make.expanded)),
    case("no-residual", "the sum is x, whose gradients meet in the norm", of(7, 72, residual=None)),
    case("no-weight", "no affine part", of(5, 64, weight=False)),
    case("8192x4096", "Llama-3-8B hidden states", of(8192, 4096), large=True),
    case("16384x2048", "Llama-3.2-1B hidden states", of(16384, 2048), large=True),
)
SPEC = OpSpec(
    name="fused_add_rms_norm",
    function=fused_add_rms_norm,
    reference=reference.fused_add_rms_norm,
    cases=CASES,
    differentiable=(0, 1, 2),
    defaults={"eps": 1e-6, "offset": 0.0, "casting_mode": "llama"},
    traffic=(4, (0, 1)),
)
