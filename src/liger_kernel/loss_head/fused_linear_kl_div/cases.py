"""Inputs of the fused linear KL divergence for tests and benchmarks."""

from __future__ import annotations

from torch import Tensor

from liger_kernel.loss_head.fused_linear_kl_div import fused_linear_kl_div, reference
from liger_kernel.testing import Inputs, Make, OpSpec, case


def _head(
    rows: int, width: int, classes: int, ignored: float | None = None, zeros: bool = False
) -> Inputs:
    """zeros: a third of the probabilities."""

    def inputs(make: Make) -> tuple[Tensor | None, ...]:
        logits = make.randn(rows, classes, scale=2)
        if zeros:
            logits[make.integers(3, rows, classes) == 0] = -float("inf")
        labels = None if ignored is None else make.labels(rows, classes, ignored)
        weight = make.randn(classes, width, scale=2 * width**-0.5)
        return make.randn(rows, width), weight, logits.softmax(-1), labels

    return inputs


CASES = (
    case("odd", "the usual call", _head(7, 16, 301), chunk_size=3),
    case("mean", "over the classes, too", _head(9, 16, 61, 0.4), reduction="mean", chunk_size=4),
    case("sum", "cooled", _head(5, 16, 61, 0.3), reduction="sum", temperature=2.0),
    case("zeros", "0 log 0 = 0", _head(5, 16, 61, zeros=True), temperature=0.5),
    case("eps", "larger than many probabilities", _head(5, 16, 61), eps=0.01),
    case("no-rows", "gradients of 0", _head(0, 16, 61)),
    case("all-ignored", "likewise", _head(4, 16, 61, 1.0), reduction="mean"),
    case(
        "8192x2048x128256",
        "Llama-3.2-1B and kept probabilities",
        _head(8192, 2048, 128256),
        flops=6 * 8192 * 128256 * 2048,
        large=True,
    ),
)
SPEC = OpSpec(
    name="fused_linear_kl_div",
    function=fused_linear_kl_div,
    reference=reference.fused_linear_kl_div,
    cases=CASES,
    differentiable=(0, 1),
    defaults={"reduction": "batchmean", "ignore_index": -100, "temperature": 1.0},
)
