"""Inputs of the modulated RMSNorm for tests and benchmarks."""

from __future__ import annotations

from typing import Any

from liger_kernel.ops.modulated_rms_norm import modulated_rms_norm, reference
from liger_kernel.testing import Inputs, Make, OpSpec, case


def of(
    *shape: int,
    scale: tuple[int, ...] = (),
    draw: Any = Make.randn,
    weight: bool = True,
    shift: bool = True,
    **how: float,
) -> Inputs:
    """`scale`: its dimensions before the last."""

    def inputs(make: Make) -> Any:
        n = shape[-1]
        w = make.randn(n) if weight else None
        b = make.randn(*scale, n) if shift else None
        return draw(make, *shape, **how), w, make.randn(*scale, n), b

    return inputs


def _views(make: Make) -> Any:
    """A weight with gaps, a scale with gaps, a shift that is one number."""
    scale = make.randn(2, 1, 83)[..., 1:41]
    return make.randn(2, 6, 40), make.randn(80)[::2], scale, make.randn(1).expand(2, 40)


GEMMA: dict[str, Any] = {"offset": 1.0, "casting_mode": "gemma"}
CASES = (
    case(
        "batch",
        "a scale for each entry of the batch, several tiles each",
        of(3, 37, 96, scale=(3,)),
    ),
    case("shared", "one scale for all rows", of(67, 96)),
    case("tokens", "a scale for each row", of(3, 5, 64, scale=(3, 5))),
    case("gemma", "offset 1, one rounding of the norm", of(2, 9, 64, scale=(2, 1)), **GEMMA),
    case("none", "no promised fp32 statistics", of(5, 48), casting_mode="none"),
    case("no-weight", "as in DiT", of(2, 9, 64, scale=(2,), weight=False)),
    case("no-shift", "a scale alone", of(2, 9, 64, scale=(2,), shift=False)),
    case("many-scales", "more scales than programs", of(40, 3, 24, scale=(40,))),
    case("one-row", "one row, odd width", of(1, 333)),
    case("no-rows", "empty batch: gradients of zero, not of garbage", of(0, 32)),
    case("wide-row", "the longest row that backward was made for", of(2, 3, 8192, scale=(2,))),
    case("long-row", "a row that the forward reads twice", of(2, 2, 16384 + 40, scale=(2,))),
    case("strided", "row stride larger than the row", of(2, 6, 40, scale=(2,), draw=Make.strided)),
    case("transposed", "last dimension not contiguous", of(6, 40, draw=Make.transposed)),
    case("parameter-views", "any strides", _views),
    case("large-eps", "eps dominates", of(4, 64), eps=10.0),
    case("2x4096x3072", "FLUX", of(2, 4096, 3072, scale=(2,), weight=False), large=True),
    case("8192x4096", "one scale for all rows", of(8192, 4096), large=True),
)
SPEC = OpSpec(
    name="modulated_rms_norm",
    function=modulated_rms_norm,
    reference=reference.modulated_rms_norm,
    cases=CASES,
    differentiable=(0, 1, 2, 3),
    defaults={"eps": 1e-6, "offset": 0.0, "casting_mode": "llama"},
    traffic=(5, (0,)),
)
