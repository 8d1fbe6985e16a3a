"""Inputs of cross entropy for tests and benchmarks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from liger_kernel.ops.cross_entropy import cross_entropy, reference
from liger_kernel.testing import Make, OpCase, OpSpec, case


def _case(
    id: str,
    why: str,
    rows: int,
    classes: int,
    *,
    draw: Any = Make.randn,
    ignored: float = 0.3,
    weighted: bool = False,
    scale: float = 3.0,
    **options: Any,
) -> OpCase:
    def inputs(make: Make) -> tuple[Tensor | None, ...]:
        labels = make.labels(rows, classes, ignored, options.get("ignore_index", -100))
        logits = draw(make, rows, classes, scale=scale)
        return logits, labels, make.randn(classes).abs() + 0.1 if weighted else None

    return case(id, why, inputs, **options)


def _peaked(make: Make) -> tuple[Tensor | None, ...]:
    labels = make.labels(6, 120, 0.3)
    return make.peaked(6, 120, labels), labels, None


def _ties(make: Make) -> tuple[Tensor | None, ...]:
    """Logits in {-1, 0, 1}: the largest occurs many times, first in any column."""
    return (make.integers(3, 6, 90) - 1).to(make.dtype), make.labels(6, 90, 0.3), None


def _ties_in_two_blocks(make: Make) -> tuple[Tensor | None, ...]:
    return make.integers(2, 2, 16450).to(make.dtype), make.labels(2, 16450), None


def _masked(make: Make) -> tuple[Tensor | None, ...]:
    """The first 16,400 classes are ruled out with -inf."""
    labels = make.labels(6, 37, 0.3)
    logits = make.randn(6, 16437)
    logits[:, :16400] = -torch.inf
    return logits, torch.where(labels < 0, labels, labels + 16400), None


#: every output
REPORTS: dict[str, Any] = {
    "return_z_loss": True,
    "return_token_accuracy": True,
    "return_predicted_tokens": True,
}
#: every option, and every output
ALL: dict[str, Any] = {
    "lse_square_scale": 1e-3,
    "label_smoothing": 0.1,
    "softcap": 5.0,
    "weighted": True,
    **REPORTS,
}
NONE: dict[str, Any] = {"reduction": "none"}
LARGE: dict[str, Any] = {"ignored": 0.0, "large": True}

CASES = (
    _case("mean", "the usual call, odd number of classes, some labels ignored", 7, 301),
    _case("sum", "no division; every output", 6, 130, reduction="sum", **REPORTS),
    _case("none", "one upstream gradient per row; every output", 6, 77, **NONE, **REPORTS),
    _case("smoothing", "label smoothing", 5, 64, label_smoothing=0.2),
    _case("weighted", "divided by the class weights of the labels", 9, 40, weighted=True),
    _case("softcap", "capped before the padding is masked", 5, 100, softcap=4.0, **REPORTS),
    _case("small-softcap", "tanh saturates", 5, 100, scale=30.0, softcap=2.0),
    _case("large-softcap", "1 - 2 / (exp + 1) would cancel", 4, 100, softcap=500.0),
    _case("z-loss", "z-loss and its report", 6, 65, lse_square_scale=1e-2, **REPORTS),
    _case("all-mean", "every option at once", 8, 200, **ALL),
    _case("all-sum", "every option at once", 5, 33, reduction="sum", **ALL),
    _case("all-none", "every option at once", 5, 70, **NONE, **ALL),
    _case("long-row", "a row of two blocks", 3, 16384 + 57, label_smoothing=0.1, **REPORTS),
    _case("long-row-all", "two blocks, every option", 2, 16384 + 300, ignored=0.0, **ALL),
    _case("one-row", "one row", 1, 50, ignored=0.0),
    _case("two-classes", "fewer classes than threads", 4, 2),
    _case("no-rows", "empty batch: loss 0", 0, 32, **REPORTS),
    _case("all-ignored", "no division by zero, gradient 0", 4, 45, ignored=1.0, **REPORTS),
    _case("all-ignored-all", "likewise with every option", 4, 45, ignored=1.0, **ALL),
    _case("ignore-class-0", "ignore_index may be a class", 12, 5, ignore_index=0, **REPORTS),
    _case("ignore-class-1", "1 is special to Triton", 12, 5, ignore_index=1, **NONE),
    case("ties-in-two-blocks", "the first of equal maxima", _ties_in_two_blocks, **REPORTS),
    case("masked-classes", "a whole block of -inf before the rest", _masked, **REPORTS),
    case("peaked", "p of the label near 1, or its loss near 60", _peaked, **REPORTS),
    case("peaked-none", "likewise per row", _peaked, **NONE),
    case("ties", "the first of equal maxima", _ties, **REPORTS),
    _case("strided", "row stride larger than the row", 6, 90, draw=Make.strided),
    _case("transposed", "last dimension not contiguous", 6, 90, draw=Make.transposed),
    _case("transposed-none", "likewise, recomputed", 6, 90, draw=Make.transposed, **NONE),
    _case("expanded", "stride 0", 6, 90, draw=Make.expanded),
    _case("8192x128256", "Llama 3", 8192, 128256, **LARGE),
    _case("8192x128256-ignored30", "rows that only get zeros", 8192, 128256, large=True),
    _case("16384x32000", "Llama 2", 16384, 32000, **LARGE),
    _case("8192x128256-in-place", "no memory of its own", 8192, 128256, in_place=True, **LARGE),
    _case("4096x256000", "Gemma, capped", 4096, 256000, softcap=30.0, **LARGE),
    _case("20000x128256", "> 2^31 logits", 20000, 128256, reduction="sum", **LARGE),
)
SPEC = OpSpec(
    name="cross_entropy",
    function=cross_entropy,
    reference=reference.cross_entropy,
    cases=CASES,
    differentiable=(0,),
    outputs_without_grad=(1, 2, 3),
    elementwise=(0, 1),
    traffic=(2, (0,)),
)
