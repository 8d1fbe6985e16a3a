"""Inputs of the coefficients of hyper-connections for tests and benchmarks."""

from __future__ import annotations

from typing import Any

from liger_kernel.ops.mhc_sinkhorn import mhc_sinkhorn, reference
from liger_kernel.testing import Inputs, Make, OpSpec, case


def of(*tokens: int, hc: int, draw: Any = Make.randn, scale: float = 2.0) -> Inputs:
    size = hc * hc + 2 * hc
    return lambda make: (
        draw(make, *tokens, size, scale=scale),
        make.randn(size),
        *(make.randn(*shape, shift=1.0) for shape in ((), (1,), ())),
    )


CASES = (
    case("four", "two programs", of(33, hc=4)),
    case("three", "no power of two, a batch of sequences", of(2, 3, hc=3), tmax=6),
    case("one-stream", "the smallest matrix", of(5, hc=1)),
    case(
        "once",
        "columns alone, every option",
        of(5, hc=2, draw=Make.transposed),
        tmax=1,
        pre_eps=1e-3,
        sinkhorn_eps=0.1,
        post_mult=1.5,
    ),
    case("no-rows", "no token: gradients of zero", of(0, hc=2)),
    case("certain", "softmax of one class, no eps", of(4, hc=3, scale=20), sinkhorn_eps=0.0),
    case("res-alone", "the other outputs unused", of(hc=2), unused=(0, 1)),
    case("pre-post", "h_res unused", of(4, hc=2), unused=(2,)),
    case("8192x24", "DeepSeek-V4", of(8192, hc=4), large=True, tmax=20),
)
SPEC = OpSpec(
    name="mhc_sinkhorn",
    function=mhc_sinkhorn,
    reference=reference.mhc_sinkhorn,
    cases=CASES,
    differentiable=(0, 1, 2, 3, 4),
    defaults={"tmax": 3, "pre_eps": 0.0, "sinkhorn_eps": 1e-6, "post_mult": 2.0},
    traffic=(5, (0,)),
)
