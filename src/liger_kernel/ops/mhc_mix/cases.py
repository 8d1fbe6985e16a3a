"""Inputs of the mixing of streams for tests and benchmarks."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from liger_kernel.ops.mhc_mix import mhc_mix, reference
from liger_kernel.testing import Inputs, Make, OpSpec, case


def of(*shape: int, out: int, f: bool = True, draw: Any = Make.randn) -> Inputs:
    """x of `shape`, with so many streams `out`."""
    *tokens, streams, size = shape

    def inputs(make: Make) -> Any:
        more = (draw(make, *tokens, size), make.randn(*tokens, out)) if f else (None, None)
        return draw(make, *shape), make.randn(*tokens, out, streams), *more

    return inputs


def _bytes(x: Tensor, weights: Tensor, f: Tensor | None, f_weights: Tensor | None) -> int:
    """x and f are read twice, and their gradients written; y is written, and its gradient read."""
    streams = 3 * x.shape[-2] + 2 * weights.shape[-2] + (0 if f is None else 3)
    return streams * x[..., 0, :].numel() * x.element_size()


CASES = (
    case("post-res", "four streams and the layer's, two tiles", of(2, 4, 1056, out=4)),
    case("pre", "to one stream", of(3, 4, 40, out=1, f=False)),
    case("odd", "streams that are no power of two", of(3, 3, 33, out=3)),
    case("more-out", "as many outputs as one likes", of(2, 2, 20, out=5)),
    case("two-streams", "a batch of sequences", of(1, 2, 2, 24, out=2)),
    case("many-streams", "few columns at a time", of(9, 40, out=9)),
    case("no-tokens", "empty batch", of(0, 4, 24, out=4)),
    case("strided", "rows with gaps", of(2, 4, 40, out=4, draw=Make.strided)),
    case("transposed", "columns first", of(2, 4, 40, out=1, f=False, draw=Make.transposed)),
    case("8192x4x4096", "post-residual, DeepSeek-V4-Flash", of(8192, 4, 4096, out=4), large=True),
    case("8192x4x4096-pre", "pre", of(8192, 4, 4096, out=1, f=False), large=True),
)
SPEC = OpSpec(
    name="mhc_mix",
    function=mhc_mix,
    reference=reference.mhc_mix,
    cases=CASES,
    differentiable=(0, 1, 2, 3),
    traffic=_bytes,
)
