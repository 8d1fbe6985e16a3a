"""Inputs of RMSNorm and rotary embedding of heads, for tests and benchmarks."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from liger_kernel.ops.qk_norm_rope import qk_norm_rope, reference
from liger_kernel.testing import Make, OpCase, OpSpec, case


def _case(
    id: str,
    why: str,
    batch: int,
    seq: int,
    heads: tuple[int, int],
    dim: int,
    angles: tuple[int, ...] | None = None,
    weights: str = "head",
    layout: Any = Make.randn,
    scale: float = 1.0,
    **options: Any,
) -> OpCase:
    """`heads`: of q and of k, 0 for no k; `weights`: "head", "token" or "none"; `layout`: of (B, S, H, D)."""
    shape = angles or (1, seq, dim)
    heads_third = options.get("unsqueeze_dim") == 2

    def weight(make: Make, n: int) -> Tensor | None:
        if not n or weights == "none":
            return None
        return make.randn(dim if weights == "head" else n * dim)

    def inputs(make: Make) -> tuple[Tensor | None, ...]:
        q, k = (layout(make, batch, seq, n, dim) * scale if n else None for n in heads)
        if not heads_third:
            q, k = (None if t is None else t.transpose(1, 2) for t in (q, k))
        ws = (weight(make, n) for n in heads)
        return q, k, *ws, make.randn(*shape), make.randn(*shape)

    return case(id, why, inputs, **options)


GEMMA: dict[str, Any] = {"offset": 1.0, "casting_mode": "gemma", "unsqueeze_dim": 2}
PARTIAL: dict[str, Any] = {"rotary_dim": 6, "interleaved": True, "casting_mode": "none"}
QWEN3 = ((32, 8), 128)
CASES = (
    _case("qwen3", "grouped heads, several programs, odd sequence", 2, 9, (4, 2), 16),
    _case(
        "gemma",
        "offset, one rounding, heads third, own angles",
        2,
        5,
        (3, 1),
        16,
        (2, 5, 16),
        **GEMMA,
    ),
    _case(
        "olmo2",
        "all heads of a token, an odd number; partial",
        1,
        5,
        (3, 2),
        20,
        (5, 8),
        weights="token",
    ),
    _case(
        "interleaved", "neighbours, half-width cos, partial", 2, 3, (2, 1), 21, (2, 3, 3), **PARTIAL
    ),
    _case(
        "no-weight",
        "no affine part, strides with gaps",
        2,
        5,
        (2, 1),
        16,
        weights="none",
        layout=Make.strided,
    ),
    _case(
        "no-k", "one tensor, as in Gemma 4, and eps decides", 2, 5, (3, 0), 16, scale=1e-4, eps=1e-5
    ),
    _case("q-unused", "no gradient for q", 1, 5, (2, 1), 16, weights="none", unused=(0,)),
    _case("many-heads", "heads in several chunks, one token", 1, 1, (9, 0), 512),
    _case("no-tokens", "gradients of zero, not of garbage", 0, 4, (2, 0), 8),
    _case("qwen3-8b", "B4 S2048 32/8 D128", 4, 2048, *QWEN3, large=True),
    _case("olmo2-7b", "B4 S2048 32/32 D128", 4, 2048, (32, 32), 128, weights="token", large=True),
    _case("gemma3", "B4 S2048 8/4 D256", 4, 2048, (8, 4), 256, large=True, **GEMMA),
)
SPEC = OpSpec(
    name="qk_norm_rope",
    function=qk_norm_rope,
    reference=reference.qk_norm_rope,
    cases=CASES,
    differentiable=(0, 1, 2, 3),
    defaults={
        "eps": 1e-6,
        "offset": 0.0,
        "casting_mode": "llama",
        "unsqueeze_dim": 1,
        "rotary_dim": None,
        "interleaved": False,
    },
    traffic=(5, (0, 1)),
)
