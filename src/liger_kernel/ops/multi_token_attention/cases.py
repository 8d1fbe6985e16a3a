"""Inputs of multi-token attention for tests and benchmarks."""

from __future__ import annotations

from typing import Any

from liger_kernel.ops.multi_token_attention import multi_token_attention, reference
from liger_kernel.testing import Inputs, Make, OpSpec, case


def of(
    batch: int,
    channels: int,
    length: int,
    *weight: int,
    bias: bool = True,
    draw: Any = Make.randn,
) -> Inputs:
    fan_in = weight[1] * weight[2] * weight[3]

    def inputs(make: Make) -> Any:
        scores = draw(make, batch, channels, length, length, scale=2)
        weights = make.randn(*weight, scale=fan_in**-0.5)
        return scores, weights, make.randn(weight[0]) if bias else None

    return inputs


CASES = (
    case("heads-mixed", "odd length", of(2, 4, 13, 6, 4, 3, 3), padding=1),
    case("groups", "no bias", of(2, 4, 9, 4, 2, 3, 3, bias=False), padding=1, groups=2),
    case("strided-and-dilated", "", of(1, 2, 12, 2, 2, 3, 3), stride=2, padding=2, dilation=2),
    case("oblong", "pairs", of(1, 2, 9, 2, 2, 3, 5), padding=(1, 2)),
    case("sparse", "sparsemax", of(2, 2, 11, 2, 2, 3, 3), padding=1, sparse=True),
    case("one-token", "gradient 0 for the score", of(2, 2, 1, 2, 2, 1, 1)),
    case("no-batch", "empty", of(0, 2, 5, 2, 2, 3, 3), padding=1),
    case("transposed", "keys first", of(1, 2, 9, 2, 2, 3, 3, draw=Make.transposed), padding=1),
    case(
        "same",
        "even kernel, more zeros behind than before",
        of(1, 2, 9, 2, 2, 2, 4),
        padding="same",
    ),
    case("valid", "fewer queries than were given", of(2, 1, 9, 2, 1, 3, 3), padding="valid"),
    case(
        "each-head",
        "channels that are not mixed",
        of(1, 3, 12, 3, 1, 5, 7),
        padding=(2, 3),
        groups=3,
    ),
    case(
        "many-heads",
        "several blocks of heads",
        of(1, 10, 3, 70, 10, 3, 3),
        padding=1,
    ),
    case("16x1024", "16 heads", of(4, 16, 1024, 16, 16, 3, 3), padding=1, large=True),
)
SPEC = OpSpec(
    name="multi_token_attention",
    function=multi_token_attention,
    reference=reference.multi_token_attention,
    cases=CASES,
    differentiable=(0, 1, 2),
    defaults={"stride": 1, "padding": 0, "dilation": 1, "groups": 1, "sparse": False},
    traffic=(9, (0,)),
)
