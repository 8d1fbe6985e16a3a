"""Inputs of attention residuals for tests and benchmarks."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from liger_kernel.ops.attn_res import attn_res, reference
from liger_kernel.testing import Inputs, Make, OpSpec, case


def of(*shape: int, draw: Any = Make.randn, scale: float = 1.0) -> Inputs:
    size = shape[-1]
    return lambda make: (
        draw(make, *shape, scale=scale),
        make.randn(size, scale=size**-0.5),
        make.randn(size, scale=0.5, shift=1.0),
    )


def _bytes(blocks: Tensor, *_: Tensor) -> int:
    """The blocks are read twice, and their gradients written; the sum is written, and its gradient read."""
    return (3 * len(blocks) + 2) * blocks[0].numel() * blocks.element_size()


CASES = (
    case("blocks", "more tokens than programs, odd width", of(2, 34, 13)),
    case("many-blocks", "more than 32", of(33, 1, 8)),
    case("one-block", "nothing to choose from", of(1, 3, 24)),
    case("3d", "a batch of sequences", of(2, 2, 2, 24)),
    case("one-token", "no dimension of tokens", of(4, 24)),
    case("no-tokens", "empty batch: gradients of zero", of(3, 0, 24)),
    case("strided", "rows with gaps", of(2, 2, 40, draw=Make.strided)),
    case("transposed", "columns first", of(2, 2, 40, draw=Make.transposed)),
    case("tiny-values", "eps decides", of(2, 2, 24, scale=1e-3), eps=1e-5),
    case("normed", "the sum of what the norm makes", of(3, 34, 13), normed=True),
    case(
        "normed-tiny", "and eps decides", of(2, 2, 24, scale=1e-3, draw=Make.strided), normed=True
    ),
    case("8x8192x4096", "eight blocks", of(8, 8192, 4096), large=True),
)
SPEC = OpSpec(
    name="attn_res",
    function=attn_res,
    reference=reference.attn_res,
    cases=CASES,
    differentiable=(0, 1, 2),
    defaults={"eps": 1e-6, "normed": False},
    traffic=_bytes,
)
