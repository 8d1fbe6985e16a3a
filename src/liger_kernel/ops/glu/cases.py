"""Inputs of the gated activation for tests and benchmarks."""

from __future__ import annotations

from typing import Any

from liger_kernel.ops.glu import gated_product, reference
from liger_kernel.testing import Inputs, Make, OpSpec, case


def of(*shape: int, gate: Any = Make.randn, up: Any = Make.randn, scale: float = 3) -> Inputs:
    return lambda make: (gate(make, *shape, scale=scale), up(make, *shape))


def packed(*shape: int, draw: Any = Make.randn) -> Inputs:
    """Gate and up, each of `shape`, in one tensor."""
    return lambda make: (draw(make, *shape[:-1], 2 * shape[-1], scale=3), None)


OAI = {"activation": "silu_oai", "limit": 2.0, "alpha": 1.702}
CASES = (
    case("silu", "several tiles of several rows, odd row count", of(67, 96)),
    case("gelu-tanh", "Gemma", of(9, 130), activation="gelu_tanh"),
    case("gelu", "exact, with erf", of(9, 130), activation="gelu"),
    case("two-column-tiles", "a row wider than a tile, several tiles of rows", of(5, 1024 + 40)),
    case("multipliers", "Falcon-H1", of(5, 72), gate_multiplier=0.7, down_multiplier=2.5),
    case("gelu-multiplier", "the other branch", of(3, 40), activation="gelu", gate_multiplier=-1.5),
    case("one-column", "a row of one element", of(5, 1)),
    case("one-row", "one row, odd width", of(1, 333)),
    case("no-rows", "empty batch", of(0, 32)),
    case("packed", "gate and up in one tensor", packed(33, 100)),
    case("packed-odd-half", "up starts at an odd address", packed(7, 65), activation="gelu_tanh"),
    case("packed-one-column", "halves of one element", packed(3, 1)),
    case("packed-gate", "multiplied", packed(3, 40), gate_multiplier=2, down_multiplier=0.3),
    case("packed-no-rows", "empty batch, packed", packed(0, 32)),
    case("4d", "leading dimensions", of(2, 3, 4, 24)),
    case("vector", "one dimension", of(24)),
    case("strided", "row stride larger than the row, two strides", of(6, 40, gate=Make.strided)),
    case("transposed", "last dimension not contiguous", of(6, 40, up=Make.transposed)),
    case("expanded", "stride 0", of(6, 40, gate=Make.expanded)),
    case("packed-strided", "a slice of a wider projection", packed(2, 3, 20, draw=Make.strided)),
    case("large-values", "both tails saturate", of(4, 64, scale=100), activation="gelu_tanh"),
    case("large-values-silu", "exp overflows", of(4, 64, scale=100)),
    case("limit", "DeepSeek-V4: gate and up on both sides of it", of(9, 40), limit=2.0),
    case(
        "limit-frozen-gate", "up tells where its gradient is 0", of(5, 24), limit=2.0, frozen=(0,)
    ),
    case(
        "limit-gelu",
        "multiplied before",
        of(5, 24),
        activation="gelu",
        limit=1.5,
        gate_multiplier=2,
    ),
    case("oai", "gpt-oss: gate and up alternate", packed(9, 65), **OAI, interleaved=True),
    case("oai-two-tiles", "alternating in two tiles", packed(3, 1030), **OAI, interleaved=True),
    case("oai-pair", "of two tensors", of(5, 24), **OAI, down_multiplier=0.5),
    case("step", "Step-3: f is limited", of(9, 40, scale=4), activation="silu_step", limit=3.0),
    case("step-no-limit", "silu", packed(3, 20), activation="silu_step"),
    case("8192x14336", "Llama-3-8B", of(8192, 14336), large=True),
    case("8192x14336-gelu", "GeGLU", of(8192, 14336), large=True, activation="gelu_tanh"),
    case("8192x14336-packed", "Phi-3 form", packed(8192, 14336), large=True),
    case(
        "65536x2880-oai",
        "an expert of gpt-oss",
        packed(65536, 2880),
        large=True,
        interleaved=True,
        **OAI,
    ),
    case("16384x8192", "Llama-3.2-1B", of(16384, 8192), large=True),
    case("65536x768", "one expert of Qwen3-30B-A3B", of(65536, 768), large=True),
)
SPEC = OpSpec(
    name="glu",
    function=gated_product,
    reference=reference.glu,
    cases=CASES,
    differentiable=(0, 1),
    defaults={"activation": "silu", "gate_multiplier": 1.0, "down_multiplier": 1.0},
    traffic=(4, (0, 1)),
)
