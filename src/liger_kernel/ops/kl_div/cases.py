"""Inputs of the KL divergence for tests and benchmarks."""

from __future__ import annotations

from functools import partial

from liger_kernel.ops.divergences.cases import pair, shapes
from liger_kernel.ops.kl_div import kl_div, reference
from liger_kernel.testing import Make, OpSpec, case

of = partial(pair, logs=(True, False))
CASES = (
    *shapes(of),
    case("mean", "divided by all terms", of(7, 130), reduction="mean"),
    case("sum", "not divided", of(7, 130), reduction="sum"),
    case("none", "a gradient arrives for each term", of(7, 130), reduction="none"),
    case("none-transposed", "likewise", of(7, 90, draw=Make.transposed), reduction="none"),
    case("log-target", "the target is logarithms, too", pair(9, 130), log_target=True),
    case("log-none", "likewise, term by term", pair(9, 130), log_target=True, reduction="none"),
    case("zeros", "0 log 0 = 0", of(9, 130, zeros="y")),
    case("zeros-none", "some terms are infinite", of(9, 130, zeros="xy"), reduction="none"),
    case("log-zeros", "-inf in the target", pair(9, 130, zeros="y"), log_target=True),
    case("log-zeros-mean", "infinite", pair(9, 130, zeros="xy"), log_target=True, reduction="mean"),
    case("eps", "most probabilities are below it", of(9, 130), eps=0.02),
    case("4096x128256-log", "two exponentials less", pair(4096, 128256), log_target=True, large=True),
    case("4096x128256-none", "2 kernels", of(4096, 128256), reduction="none", large=True),
)  # fmt: skip
SPEC = OpSpec(
    name="kl_div",
    function=kl_div,
    reference=reference.kl_div,
    cases=CASES,
    differentiable=(0,),
    defaults={"reduction": "batchmean", "log_target": False, "eps": 1e-10},
    traffic=(1, (0, 0, 1)),
)
