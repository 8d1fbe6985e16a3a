"""Inputs of the normalised projection for tests and benchmarks."""

from __future__ import annotations

from typing import Any

from liger_kernel.ops.mhc_project import mhc_project, reference
from liger_kernel.testing import Inputs, Make, OpSpec, case


def of(*shape: int, out: int, draw: Any = Make.randn, scale: float = 1.0) -> Inputs:
    size = shape[-1]
    return lambda make: (draw(make, *shape, scale=scale), make.randn(size, out, scale=size**-0.5))


def _wide_weight(make: Make) -> Any:
    """As in transformers: a weight of its own dtype, stored the other way round."""
    return make.randn(40, 64), make.randn(24, 64, scale=0.1).float().t()


CASES = (
    case("streams", "several tiles of tokens and of columns", of(70, 300, out=24)),
    case("wide-weight", "a weight in fp32, transposed", _wide_weight),
    case("one-column", "the narrowest weight", of(5, 40, out=1)),
    case("many-columns", "eight streams", of(3, 48, out=80)),
    case("3d", "a batch of sequences", of(2, 3, 40, out=8)),
    case("vector", "one token", of(40, out=8)),
    case("no-rows", "no token: gradients of zero", of(0, 40, out=8)),
    case("strided", "rows with gaps", of(6, 40, out=8, draw=Make.strided)),
    case("transposed", "columns first", of(6, 40, out=8, draw=Make.transposed)),
    case("tiny-values", "eps decides", of(4, 40, out=8, scale=1e-3), eps=1e-5),
    case(
        "8192x16384", "DeepSeek-V4-Flash, four streams of 4096", of(8192, 16384, out=24), large=True
    ),
)
SPEC = OpSpec(
    name="mhc_project",
    function=mhc_project,
    reference=reference.mhc_project,
    cases=CASES,
    differentiable=(0, 1),
    defaults={"eps": 1e-6},
    traffic=(3, (0,)),
)
