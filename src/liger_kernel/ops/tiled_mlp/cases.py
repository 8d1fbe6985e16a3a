"""Inputs of the tiled feed-forward block for tests and benchmarks."""

from __future__ import annotations

from liger_kernel.ops.gated_mlp.cases import block
from liger_kernel.ops.tiled_mlp import reference, tiled_mlp
from liger_kernel.testing import Make, OpSpec

CASES = (
    block("five-tiles", "the last one shorter", (37, 24), 40, num_tiles=5),
    block("two-tiles", "sums in the dtype of the weights", (37, 24), 40, num_tiles=2),
    block("more-tiles-than-rows", "a row each", (3, 16), 24, num_tiles=7),
    block("gelu-tanh", "Gemma", (9, 16), 66, activation="gelu_tanh", num_tiles=4),
    block("packed", "gate and up from one weight", (9, 16), 24, packed=True, num_tiles=4),
    block("no-rows", "empty batch: gradients of zero, not of garbage", (0, 16), 24, num_tiles=3),
    block("3d", "tiles across sequences", (2, 3, 16), 24, num_tiles=4),
    block("strided", "rows with gaps", (6, 16), 24, Make.strided, num_tiles=3),
    block("expanded", "stride 0", (6, 16), 24, Make.expanded, num_tiles=3),
    block("32768x4096x14336", "Llama-3-8B, a long sequence", (32768, 4096), 14336, large=True),
)
SPEC = OpSpec(
    name="tiled_mlp",
    function=tiled_mlp,
    reference=reference.tiled_mlp,
    cases=CASES,
    differentiable=(0, 1, 2, 3),
    defaults={"activation": "silu", "num_tiles": None},
)
