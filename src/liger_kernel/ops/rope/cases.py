"""Inputs of RoPE for tests and benchmarks. Random cosines and sines: nothing may rely on cos^2 + sin^2 = 1."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from liger_kernel.ops.rope import reference, rope
from liger_kernel.testing import Make, OpCase, OpSpec, case


def _transposed(make: Make, batch: int, heads: int, seq: int, dim: int) -> Tensor:
    """(B, H, S, D) as HF's attention makes it: a transposed view of the projection."""
    return make.randn(batch, seq, heads, dim).transpose(1, 2)


def _packed(make: Make, batch: int, heads: int, seq: int, dim: int) -> Tensor:
    """A slice of a fused projection: not dense."""
    return make.strided(batch, seq, heads * dim).unflatten(-1, (heads, dim)).transpose(1, 2)


def _complex(make: Make, *shape: int) -> tuple[Tensor, Tensor]:
    """The real and the imaginary part of complex angles."""
    pairs = make.randn(*shape, 2)
    return pairs[..., 0], pairs[..., 1]


def _case(
    id: str,
    why: str,
    batch: int,
    seq: int,
    heads: tuple[int, int],
    dim: int,
    angles: tuple[int, ...] | None = None,
    layout: Any = _transposed,
    complex: bool = False,
    **options: Any,
) -> OpCase:
    """`heads`: of q and of k, 0 for no k; `angles`: the shape of cos, by default (1, S, D)."""
    shape = angles or (1, seq, dim)
    heads_third = options.get("unsqueeze_dim") == 2

    def inputs(make: Make) -> tuple[Tensor | None, ...]:
        q, k = (layout(make, batch, n, seq, dim) if n else None for n in heads)
        if heads_third:
            q, k = (None if t is None else t.transpose(1, 2) for t in (q, k))
        if complex:
            return q, k, *_complex(make, *shape)
        return q, k, make.randn(*shape), make.randn(*shape)

    return case(id, why, inputs, **options)


HALF: dict[str, Any] = {"rotary_dim": 12, "interleaved": True}
COMPLEX: dict[str, Any] = {
    "rotary_dim": 16,
    "interleaved": True,
    "complex": True,
    "unsqueeze_dim": 2,
}
LLAMA4: dict[str, Any] = {**COMPLEX, "rotary_dim": 128, "large": True}
QWEN2_VL: dict[str, Any] = {"mrope_section": (16, 24, 24), "large": True}
TURNS: dict[str, Any] = {"mrope_section": (5, 2, 1), "mrope_interleaved": True}
MIXED: dict[str, Any] = {"mrope_section": (1, 2, 3), "rotary_dim": 12, "interleaved": True}
CASES = (
    _case("llama", "grouped heads, several programs, odd sequence", 2, 37, (4, 2), 16),
    _case("contiguous", "heads contiguous", 2, 5, (4, 2), 16, layout=Make.randn),
    _case("heads-third", "unsqueeze_dim 2", 2, 5, (4, 2), 16, unsqueeze_dim=2),
    _case("packed", "strides with gaps", 2, 5, (3, 1), 16, layout=_packed),
    _case("columns-apart", "last dimension strided", 2, 5, (2, 1), 8, layout=Make.transposed),
    _case("expanded", "stride 0", 3, 5, (2, 1), 8, layout=Make.expanded),
    _case("batch-angles", "own positions per sequence", 3, 7, (2, 1), 16, (3, 7, 16)),
    _case("2d-angles", "cos without a batch axis", 2, 7, (2, 1), 16, (7, 16)),
    _case("4d-angles", "cos with a head axis", 2, 7, (2, 1), 16, (2, 1, 7, 16)),
    _case("4d-angles-third", "heads third", 2, 7, (2, 1), 16, (2, 7, 1, 16), unsqueeze_dim=2),
    _case("half-width", "cos as in GPT-OSS", 2, 7, (2, 1), 16, (1, 7, 8), rotary_dim=16),
    _case("partial", "the columns after the rotary ones pass through", 2, 7, (2, 1), 24, (7, 10)),
    _case("partial-explicit", "less than cos is wide", 2, 7, (2, 1), 24, rotary_dim=6),
    _case("interleaved", "neighbours, full-width cos", 2, 7, (2, 1), 16, interleaved=True),
    _case("interleaved-half", "half-width cos, odd sizes", 2, 7, (3, 1), 21, (2, 7, 6), **HALF),
    _case("complex", "two parts in turns, partial", 2, 7, (3, 1), 18, (2, 7, 8), **COMPLEX),
    _case("mrope", "tables by section", 2, 7, (2, 1), 16, (3, 2, 7, 16), mrope_section=(2, 1, 5)),
    _case("mrope-turns", "Qwen3-VL, one batch axis", 2, 7, (2, 1), 16, (3, 1, 7, 16), **TURNS),
    _case("mrope-pairs", "GLM-4V: neighbours, partial", 2, 7, (2, 1), 21, (3, 2, 7, 6), **MIXED),
    _case("no-k", "one tensor", 2, 7, (3, 0), 16),
    _case("k-unused", "no gradient for k", 2, 7, (2, 1), 16, unused=(1,)),
    _case("q-unused", "no gradient for q", 2, 7, (2, 1), 16, unused=(0,)),
    _case("many-heads", "heads in several chunks, and not a power of two", 1, 3, (67, 5), 128),
    _case("one-token", "decoding", 1, 1, (2, 1), 8),
    _case("no-tokens", "empty batch", 0, 4, (2, 1), 8),
    _case("llama-8b", "B4 S2048 32/8 D128", 4, 2048, (32, 8), 128, large=True),
    _case("llama-1b", "B8 S2048 32/8 D64", 8, 2048, (32, 8), 64, large=True),
    _case("llama4", "B4 S2048 32/8 D128", 4, 2048, (32, 8), 128, (4, 2048, 64), **LLAMA4),
    _case("qwen2-vl", "B4 S2048 32/8 D128", 4, 2048, (32, 8), 128, (3, 4, 2048, 128), **QWEN2_VL),
    _case("long", "one sequence of 32768", 1, 32768, (32, 8), 128, large=True),
)
SPEC = OpSpec(
    name="rope",
    function=rope,
    reference=reference.rope,
    cases=CASES,
    differentiable=(0, 1),
    defaults={
        "unsqueeze_dim": 1,
        "rotary_dim": None,
        "interleaved": False,
        "mrope_section": None,
        "mrope_interleaved": False,
    },
    traffic=(4, (0, 1)),
)
