"""Inputs of the JSD for tests and benchmarks."""

from __future__ import annotations

from liger_kernel.ops.divergences.cases import labelled, pair, shapes
from liger_kernel.ops.jsd import jsd, reference
from liger_kernel.testing import OpSpec, case

CASES = (
    *shapes(pair),
    *labelled(pair),
    case("beta-0", "forward KL divergence", pair(9, 130, ignored=0.3), beta=0.0),
    case("beta-1", "reverse KL divergence", pair(9, 130, ignored=0.3), beta=1.0),
    case("beta-0.1", "weights that are not equal", pair(9, 130), beta=0.1),
    case("beta-0.999", "a mixture that is nearly the teacher", pair(9, 130), beta=0.999),
    case("far-apart", "ratios beyond what fp32 holds", pair(9, 130, scale=40), beta=0.3),
    case("close", "logarithms that nearly cancel", pair(9, 130, apart=0.01), beta=0.3),
    case("zeros", "0 log 0 = 0 on either side, and on both", pair(9, 130, zeros="xy"), beta=0.3),
    case("zeros-0", "finite", pair(9, 130, zeros="y"), beta=0.0),
    case("zeros-1", "finite", pair(9, 130, zeros="x"), beta=1.0),
    case("infinite-0", "q is 0 and p is not", pair(9, 130, zeros="xy"), beta=0.0),
    case("infinite-1", "p is 0 and q is not", pair(9, 130, zeros="xy"), beta=1.0),
    case("4096x128256-beta-0", "forward", pair(4096, 128256), beta=0.0, large=True),
    case("4096x128256-beta-1", "reverse", pair(4096, 128256), beta=1.0, large=True),
)
SPEC = OpSpec(
    name="jsd",
    function=jsd,
    reference=reference.jsd,
    cases=CASES,
    differentiable=(0,),
    defaults={"beta": 0.5, "ignore_index": -100},
    traffic=(1, (0, 0, 1)),
)
