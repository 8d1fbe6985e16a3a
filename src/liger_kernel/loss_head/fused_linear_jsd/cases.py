"""Inputs of the fused linear JSD for tests and benchmarks."""

from __future__ import annotations

from torch import Tensor

from liger_kernel.loss_head.fused_linear_jsd import fused_linear_jsd, reference
from liger_kernel.testing import Inputs, Make, OpSpec, case


def _heads(
    rows: int,
    widths: tuple[int, int],
    classes: tuple[int, int],
    ignored: float | None = None,
    ignore_index: int = -100,
) -> Inputs:
    """A student and a teacher, of so many classes each; a teacher of width 0 gives logits."""

    def inputs(make: Make) -> tuple[Tensor | None, ...]:
        found: list[Tensor | None] = []
        for width, size in zip(widths, classes, strict=True):
            hidden = make.randn(rows, width or size, scale=1 if width else 2)
            weight = make.randn(size, width, scale=2 * width**-0.5) if width else None
            found += [hidden, weight]
        labels = None if ignored is None else make.labels(rows, min(classes), ignored, ignore_index)
        return *found, labels

    return inputs


SAME = (61, 61)
CASES = (
    case("odd", "the usual call", _heads(7, (16, 24), (301, 301)), chunk_size=3),
    case("ignored", "rows left out", _heads(9, (16, 8), SAME, 0.4), chunk_size=4, jsd_beta=0.1),
    case("beta-0", "forward", _heads(5, (16, 8), SAME, 0.3), jsd_beta=0.0, temperature=2.0),
    case("beta-1", "reverse", _heads(5, (16, 8), SAME), jsd_beta=1.0, temperature=0.8),
    case("classes-more", "logits of 0", _heads(5, (16, 8), (61, 70)), temperature=2.0),
    case("classes-less", "likewise", _heads(5, (16, 8), (70, 61)), jsd_beta=0.0),
    case("logits", "of the teacher", _heads(7, (16, 0), SAME, 0.4), chunk_size=2),
    case("no-rows", "gradients of 0", _heads(0, (16, 8), SAME)),
    case("ignore-class-0", "all", _heads(4, (16, 8), (5, 5), 1.0, 0), ignore_index=0),
    case(
        "8192x2048+4096x128256",
        "Llama-3.2-1B learns from Llama-3-8B",
        _heads(8192, (2048, 4096), (128256, 128256)),
        flops=2 * 8192 * 128256 * (3 * 2048 + 4096),
        large=True,
    ),
)
SPEC = OpSpec(
    name="fused_linear_jsd",
    function=fused_linear_jsd,
    reference=reference.fused_linear_jsd,
    cases=CASES,
    differentiable=(0, 1),
    defaults={"jsd_beta": 0.5, "ignore_index": -100, "temperature": 1.0},
)
