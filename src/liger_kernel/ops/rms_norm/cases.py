"""Inputs of RMSNorm for tests and benchmarks."""

from __future__ import annotations

from typing import Any

from liger_kernel.ops.rms_norm import reference, rms_norm
from liger_kernel.testing import Inputs, Make, OpSpec, case


def of(*shape: int, draw: Any = Make.randn, weight: bool = True, **how: float) -> Inputs:
    def inputs(make: Make) -> Any:
        return draw(make, *shape, **how), make.randn(shape[-1]) if weight else None

    return inputs


GEMMA: dict[str, Any] = {"offset": 1.0, "casting_mode": "gemma"}
CASES = (
    case("llama", "several tiles of several rows, odd row count", of(37, 96)),
    case("gemma", "offset 1, one rounding", of(9, 64), **GEMMA),
    case("none", "no promised fp32 statistics", of(5, 48), casting_mode="none"),
    case("llama-offset", "offset with the llama rounding", of(7, 100), offset=1.0),
    case("two-columns", "the shortest row whose gradient is not zero", of(5, 2)),
    case("one-row", "one row, odd width", of(1, 333)),
    case("no-rows", "empty batch: gradients of zero, not of garbage", of(0, 32)),
    case("wide-row", "a row that the backward keeps beside one running sum", of(3, 8192 + 40)),
    case("long-row", "a row that the backward reads twice", of(3, 16384 + 40)),
    case("long-row-gemma", "likewise, the offset at both reads", of(2, 16384 + 8), **GEMMA),
    case("longer-row", "a row whose backward takes two kernels", of(3, 24576 + 40)),
    case("no-weight", "no affine part", of(3, 5, 64, weight=False)),
    case("4d", "heads as in q/k norm", of(2, 3, 4, 16), eps=1e-5),
    case("strided", "row stride larger than the row", of(6, 40, draw=Make.strided)),
    case("transposed", "last dimension not contiguous", of(6, 40, draw=Make.transposed)),
    case("expanded", "stride 0", of(6, 40, draw=Make.expanded)),
    case("weight-view", "a weight with gaps", lambda m: (m.randn(6, 40), m.randn(80)[::2])),
    case("tiny-values", "eps dominates", of(4, 64, scale=1e-4), eps=1e-5),
    case("large-values", "squares near the fp16 limit", of(4, 64, scale=200)),
    case("8192x4096", "Llama-3-8B hidden states", of(8192, 4096), large=True),
    case("16384x2048", "Llama-3.2-1B hidden states", of(16384, 2048), large=True),
    case("65536x128", "q/k norm of Qwen3", of(65536, 128), large=True),
    case("8192x16384", "Llama-3-405B hidden states", of(8192, 16384), large=True),
    case("2048x32768", "a very long row", of(2048, 32768), large=True),
)
SPEC = OpSpec(
    name="rms_norm",
    function=rms_norm,
    reference=reference.rms_norm,
    cases=CASES,
    differentiable=(0, 1),
    defaults={"eps": 1e-6, "offset": 0.0, "casting_mode": "llama"},
    traffic=(5, (0,)),
)
