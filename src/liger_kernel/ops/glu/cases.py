"""Inputs of the gated activation for tests and benchmarks."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from liger_kernel.ops.glu import gated_product, reference
from liger_kernel.testing import Make, OpCase, OpSpec

DEFAULTS = {"activation": "silu", "gate_multiplier": 1.0, "down_multiplier": 1.0}


def _case(
    id: str,
    why: str,
    rows: int,
    features: int,
    packed: bool = False,
    large: bool = False,
    **options: Any,
) -> OpCase:
    def inputs(make: Make) -> tuple[Tensor | None, ...]:
        if packed:
            return make.randn(rows, 2 * features, scale=3), None
        return make.randn(rows, features, scale=3), make.randn(rows, features)

    return OpCase(
        id,
        why,
        inputs,
        {**DEFAULTS, **options},
        bytes_moved=lambda size: 8 * rows * features * size,
        large=large,
    )


def _shaped(id: str, why: str, inputs: Any, **options: Any) -> OpCase:
    return OpCase(id, why, inputs, {**DEFAULTS, **options})


SPEC = OpSpec(
    name="glu",
    function=gated_product,
    reference=reference.glu,
    differentiable=(0, 1),
    cases=(
        _case("silu", "several tiles of several rows, odd row count", 67, 96),
        _case("gelu-tanh", "Gemma", 9, 130, activation="gelu_tanh"),
        _case("gelu", "exact, with erf", 9, 130, activation="gelu"),
        _case("two-column-tiles", "a row wider than a tile, several tiles of rows", 5, 1024 + 40),
        _case("multipliers", "Falcon-H1", 5, 72, gate_multiplier=0.7, down_multiplier=2.5),
        _case(
            "gelu-multipliers",
            "multipliers in the other branch",
            3,
            40,
            activation="gelu",
            gate_multiplier=-1.5,
        ),
        _case("one-column", "a row of one element", 5, 1),
        _case("one-row", "one row, odd width", 1, 333),
        _case("no-rows", "empty batch", 0, 32),
        _case("packed", "gate and up in one tensor", 33, 100, packed=True),
        _case(
            "packed-odd-half",
            "the up half starts at an odd address",
            7,
            65,
            packed=True,
            activation="gelu_tanh",
        ),
        _case("packed-one-column", "halves of one element", 3, 1, packed=True),
        _case(
            "packed-multipliers",
            "multipliers too",
            3,
            40,
            packed=True,
            gate_multiplier=2,
            down_multiplier=0.3,
        ),
        _case("packed-no-rows", "empty batch, packed", 0, 32, packed=True),
        _shaped("4d", "leading dimensions", lambda m: (m.randn(2, 3, 4, 24), m.randn(2, 3, 4, 24))),
        _shaped("vector", "one dimension", lambda m: (m.randn(24), m.randn(24))),
        _shaped(
            "strided",
            "row stride larger than the row, two strides",
            lambda m: (m.strided(6, 40), m.randn(6, 40)),
        ),
        _shaped(
            "transposed",
            "last dimension not contiguous",
            lambda m: (m.randn(6, 40), m.transposed(6, 40)),
        ),
        _shaped("expanded", "stride 0", lambda m: (m.expanded(6, 40), m.randn(6, 40))),
        _shaped(
            "packed-strided", "a slice of a wider projection", lambda m: (m.strided(2, 3, 40), None)
        ),
        _shaped(
            "large-values",
            "both tails saturate without overflow",
            lambda m: (m.randn(4, 64, scale=100), m.randn(4, 64)),
            activation="gelu_tanh",
        ),
        _shaped(
            "large-values-silu",
            "exp overflows",
            lambda m: (m.randn(4, 64, scale=100), m.randn(4, 64)),
        ),
        _case("8192x14336", "Llama-3-8B", 8192, 14336, large=True),
        _case(
            "8192x14336-gelu",
            "GeGLU at the same size",
            8192,
            14336,
            large=True,
            activation="gelu_tanh",
        ),
        _case("8192x14336-packed", "Phi-3 form", 8192, 14336, packed=True, large=True),
        _case("16384x8192", "Llama-3.2-1B", 16384, 8192, large=True),
        _case("65536x768", "one expert of Qwen3-30B-A3B", 65536, 768, large=True),
    ),
)
