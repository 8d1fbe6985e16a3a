"""Inputs of the gated feed-forward block for tests and benchmarks."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from liger_kernel.ops.gated_mlp import gated_mlp, reference
from liger_kernel.testing import Make, OpCase, OpSpec, case


def block(
    id: str,
    why: str,
    shape: tuple[int, ...],
    features: int,
    draw: Any = Make.randn,
    packed: bool = False,
    **options: Any,
) -> OpCase:
    """x of `shape`, weights of `features`."""
    *leading, hidden = shape
    flops = 18 * hidden * features
    for size in leading:
        flops *= size

    def inputs(make: Make) -> tuple[Tensor | None, ...]:
        def weight(n_out: int, n_in: int) -> Tensor:
            return make.randn(n_out, n_in, scale=n_in**-0.5)

        gate = weight((1 + packed) * features, hidden)
        up = None if packed else weight(features, hidden)
        return draw(make, *shape), gate, up, weight(hidden, features)

    return case(id, why, inputs, flops=flops, **options)


CASES = (
    block("silu", "odd sizes", (37, 24), 40),
    block("gelu-tanh", "Gemma", (9, 16), 66, activation="gelu_tanh"),
    block("gelu", "exact, with erf", (9, 16), 66, activation="gelu"),
    block("multiplier", "Falcon-H1", (5, 16), 24, gate_multiplier=0.7),
    block("packed", "gate and up from one weight", (9, 16), 24, packed=True),
    block("packed-gelu", "likewise", (7, 16), 25, packed=True, activation="gelu_tanh"),
    block("limit", "DeepSeek-V4", (5, 16), 24, limit=0.5),
    block("oai", "MiniMax-M3", (5, 16), 24, packed=True, activation="silu_oai", limit=1, alpha=1.7),
    block("one-row", "one row", (1, 16), 24),
    block("no-rows", "empty batch: gradients of zero, not of garbage", (0, 16), 24),
    block("3d", "a batch of sequences", (2, 3, 16), 24),
    block("vector", "one dimension", (16,), 24),
    block("strided", "rows with gaps", (6, 16), 24, Make.strided),
    block("transposed", "columns first", (6, 16), 24, Make.transposed),
    block("expanded", "stride 0", (6, 16), 24, Make.expanded),
    block("8192x4096x14336", "Llama-3-8B", (8192, 4096), 14336, large=True),
    block("16384x2048x8192", "Llama-3.2-1B", (16384, 2048), 8192, large=True),
)
SPEC = OpSpec(
    name="gated_mlp",
    function=gated_mlp,
    reference=reference.gated_mlp,
    cases=CASES,
    differentiable=(0, 1, 2, 3),
    defaults={"activation": "silu", "gate_multiplier": 1.0},
)
