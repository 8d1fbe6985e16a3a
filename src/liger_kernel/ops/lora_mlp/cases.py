"""Inputs of the gated block with adapters for tests and benchmarks."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from liger_kernel.ops.lora_mlp import lora_mlp, reference
from liger_kernel.testing import Make, OpCase, OpSpec, case

_WEIGHTS = (1, 2, 3)


def _case(
    id: str,
    why: str,
    shape: tuple[int, ...],
    features: int,
    ranks: tuple[int, int, int],
    draw: Any = Make.randn,
    wide: bool = False,
    frozen: tuple[int, ...] = _WEIGHTS,
    **options: Any,
) -> OpCase:
    """x of `shape`; `ranks` of gate, up and down; `wide`: adapters in fp32 beneath a base of 16 bits."""
    *leading, hidden = shape
    sizes = ((features, hidden), (features, hidden), (hidden, features))
    flops = 12 * math.prod(leading) * (hidden * features + sum(ranks) * (hidden + features) // 3)

    def inputs(make: Make) -> tuple[Tensor, ...]:
        weights = [make.randn(*size, scale=size[1] ** -0.5) for size in sizes]
        thin: list[Tensor] = []
        for (n_out, n_in), rank in zip(sizes, ranks, strict=True):
            thin += (
                make.randn(rank, n_in, scale=n_in**-0.5),
                make.randn(n_out, rank, scale=rank**-0.5),
            )
        if wide:
            thin = [t.float() for t in thin]
        return draw(make, *shape), *weights, *thin

    return case(id, why, inputs, flops=flops, frozen=frozen, **options)


CASES = (
    _case("odd", "odd sizes and ranks", (37, 24), 41, (3, 5, 17), scaling=0.3),
    # the gradients of adapters, in fp32, would show that the interpreter of Triton truncates where a GPU rounds
    _case(
        "wide-adapter",
        "PEFT's default for a base of 16 bits",
        (40, 48),
        64,
        (4, 4, 4),
        wide=True,
        frozen=tuple(range(1, 10)),
    ),
    _case("trained", "no weight is frozen", (9, 16), 24, (4, 4, 4), frozen=()),
    _case("high-rank", "more than kernels take", (9, 16), 24, (65, 2, 4)),
    _case("gelu-tanh", "Gemma", (9, 16), 24, (4, 4, 4), activation="gelu_tanh"),
    _case("no-rows", "empty batch: gradients of zero, not of garbage", (0, 16), 24, (4, 4, 4)),
    _case("3d", "a batch of sequences", (2, 3, 16), 24, (1, 4, 4), scaling=2.0),
    _case("transposed", "columns first", (6, 16), 24, (4, 4, 4), Make.transposed),
    _case("8192x4096x14336", "Llama-3-8B", (8192, 4096), 14336, (16, 16, 16), large=True),
)
SPEC = OpSpec(
    name="lora_mlp",
    function=lora_mlp,
    reference=reference.lora_mlp,
    cases=CASES,
    differentiable=tuple(range(10)),
    defaults={"scaling": 1.0, "activation": "silu"},
)
