"""Inputs of cross entropy for tests and benchmarks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from liger_kernel.ops.cross_entropy import cross_entropy, reference
from liger_kernel.testing import Make, OpCase, OpSpec


def _case(
    id: str,
    why: str,
    rows: int,
    classes: int,
    *,
    ignored: float = 0.3,
    weighted: bool = False,
    scale: float = 3.0,
    large: bool = False,
    **options: Any,
) -> OpCase:
    def inputs(make: Make) -> tuple[Tensor | None, ...]:
        labels = make.labels(rows, classes, ignored, options.get("ignore_index", -100))
        logits = make.randn(rows, classes, scale=scale)
        return logits, labels, make.randn(classes).abs() + 0.1 if weighted else None

    return OpCase(
        id,
        why,
        inputs,
        options,
        bytes_moved=lambda size: 2 * rows * classes * size,
        large=large,
    )


def _shaped(id: str, why: str, make_logits: Any, classes: int, **options: Any) -> OpCase:
    """`make_logits(make, labels)` of shape (6, classes)."""

    def inputs(make: Make) -> tuple[Tensor | None, ...]:
        labels = make.labels(6, classes, 0.3)
        return make_logits(make, labels), labels, None

    return OpCase(id, why, inputs, options)


def _ties(make: Make, labels: Tensor) -> Tensor:
    """Logits in {-1, 0, 1}: the largest occurs many times, first in any column."""
    return (make.integers(3, 6, 90) - 1).to(make.dtype)


def _ties_in_two_blocks(make: Make) -> tuple[Tensor | None, ...]:
    return make.integers(2, 2, 16450).to(make.dtype), make.labels(2, 16450), None


def _masked(make: Make, labels: Tensor) -> Tensor:
    """The first 16,400 classes ruled out with -inf, the labels (below 37) shifted to the others by a large logit."""
    logits = make.randn(6, 16437)
    logits[:, :16400] = -torch.inf
    return logits


def _masked_inputs(make: Make) -> tuple[Tensor | None, ...]:
    labels = make.labels(6, 37, 0.3)
    return _masked(make, labels), torch.where(labels < 0, labels, labels + 16400), None


EVERYTHING: dict[str, Any] = {
    "return_z_loss": True,
    "return_token_accuracy": True,
    "return_predicted_tokens": True,
}
ALL: dict[str, Any] = {
    "lse_square_scale": 1e-3,
    "label_smoothing": 0.1,
    "softcap": 5.0,
    "weighted": True,
}

SPEC = OpSpec(
    name="cross_entropy",
    function=cross_entropy,
    reference=reference.cross_entropy,
    differentiable=(0,),
    outputs_without_grad=(1, 2, 3),
    elementwise=(0, 1),
    cases=(
        _case("mean", "the usual call, odd number of classes, some labels ignored", 7, 301),
        _case("sum", "no division; every output", 6, 130, reduction="sum", **EVERYTHING),
        _case(
            "none",
            "one upstream gradient per row; every output",
            6,
            77,
            reduction="none",
            **EVERYTHING,
        ),
        _case("smoothing", "label smoothing", 5, 64, label_smoothing=0.2),
        _case("weighted", "divided by the class weights of the labels", 9, 40, weighted=True),
        _case(
            "softcap",
            "capped before the padding is masked; accuracy of the capped",
            5,
            100,
            softcap=4.0,
            **EVERYTHING,
        ),
        _case(
            "small-softcap",
            "logits far beyond the cap, tanh saturates",
            5,
            100,
            scale=30.0,
            softcap=2.0,
        ),
        _case(
            "large-softcap",
            "logits far below the cap, 1 - 2 / (exp + 1) would cancel",
            4,
            100,
            softcap=500.0,
        ),
        _case("z-loss", "z-loss and its report", 6, 65, lse_square_scale=1e-2, **EVERYTHING),
        _case("all-mean", "every option at once", 8, 200, **ALL, **EVERYTHING),
        _case("all-sum", "every option at once", 5, 33, reduction="sum", **ALL, **EVERYTHING),
        _case("all-none", "every option at once", 5, 70, reduction="none", **ALL, **EVERYTHING),
        _case("long-row", "a row of two blocks", 3, 16384 + 57, label_smoothing=0.1, **EVERYTHING),
        _case(
            "long-row-all",
            "two blocks, every option",
            2,
            16384 + 300,
            ignored=0.0,
            **ALL,
            **EVERYTHING,
        ),
        _case("one-row", "one row", 1, 50, ignored=0.0),
        _case("two-classes", "fewer classes than threads", 4, 2),
        _case("no-rows", "empty batch: loss 0", 0, 32, **EVERYTHING),
        _case("all-ignored", "no division by zero, gradient 0", 4, 45, ignored=1.0, **EVERYTHING),
        _case(
            "all-ignored-weighted",
            "likewise with weights and smoothing",
            4,
            45,
            ignored=1.0,
            **ALL,
            **EVERYTHING,
        ),
        _case("ignore-class-0", "ignore_index may be a class", 12, 5, ignore_index=0, **EVERYTHING),
        _case("ignore-class-1", "1 is special to Triton", 12, 5, ignore_index=1, reduction="none"),
        OpCase("ties-in-two-blocks", "the first of equal maxima", _ties_in_two_blocks, EVERYTHING),
        OpCase(
            "masked-classes", "a whole block of -inf before the rest", _masked_inputs, EVERYTHING
        ),
        _shaped(
            "peaked",
            "p of the label near 1, or its loss near 60",
            lambda m, y: m.peaked(6, 120, y),
            120,
            **EVERYTHING,
        ),
        _shaped(
            "peaked-none",
            "likewise per row",
            lambda m, y: m.peaked(6, 120, y),
            120,
            reduction="none",
        ),
        _shaped("ties", "the first of equal maxima", _ties, 90, **EVERYTHING),
        _shaped("strided", "row stride larger than the row", lambda m, y: m.strided(6, 90), 90),
        _shaped(
            "transposed", "last dimension not contiguous", lambda m, y: m.transposed(6, 90), 90
        ),
        _shaped(
            "transposed-none",
            "likewise, recomputed",
            lambda m, y: m.transposed(6, 90),
            90,
            reduction="none",
        ),
        _shaped("expanded", "stride 0", lambda m, y: m.expanded(6, 90), 90),
        _case("8192x128256", "Llama 3", 8192, 128256, ignored=0.0, large=True),
        _case("8192x128256-ignored30", "rows that only get zeros", 8192, 128256, large=True),
        _case("16384x32000", "Llama 2", 16384, 32000, ignored=0.0, large=True),
        _case(
            "8192x128256-in-place",
            "no memory of its own",
            8192,
            128256,
            ignored=0.0,
            in_place=True,
            large=True,
        ),
        _case("4096x256000", "Gemma, capped", 4096, 256000, ignored=0.0, softcap=30.0, large=True),
        _case(
            "20000x128256", "> 2^31 logits", 20000, 128256, ignored=0.0, reduction="sum", large=True
        ),
    ),
)
