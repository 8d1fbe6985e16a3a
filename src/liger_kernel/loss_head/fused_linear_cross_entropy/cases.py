"""Inputs of fused linear cross entropy for tests and benchmarks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from liger_kernel.loss_head.fused_linear_cross_entropy import fused_linear_cross_entropy, reference
from liger_kernel.ops.cross_entropy.cases import NONE, REPORTS
from liger_kernel.testing import Make, OpCase, OpSpec, case

Sizes = tuple[int, int, int]  # rows, hidden size, classes


def _case(
    id: str,
    why: str,
    sizes: Sizes,
    *,
    ignored: float = 0.3,
    biased: bool = False,
    weighted: bool = False,
    **options: Any,
) -> OpCase:
    """Hidden states that point at the embedding of one class each, so that no rounding changes the prediction."""
    rows, hidden, classes = sizes

    def inputs(make: Make) -> tuple[Tensor | None, ...]:
        labels = make.labels(rows, classes, ignored, options.get("ignore_index", -100))
        weight = make.randn(classes, hidden, scale=hidden**-0.5)
        other, to_label = make.integers(classes, rows), make.integers(2, rows) == 0
        towards = torch.where(to_label, labels.clamp(min=0), other)
        states = 8 * weight[towards] + make.randn(rows, hidden, scale=0.3)
        bias = make.randn(classes, scale=0.3) if biased else None
        return states, weight, labels, bias, make.randn(classes).abs() + 0.1 if weighted else None

    used, products = options.get("label_count", rows), 3 - len(options.get("frozen", ()))
    return case(id, why, inputs, flops=2 * products * used * hidden * classes, **options)


def _large(sizes: Sizes, why: str, end: str = "", **options: Any) -> OpCase:
    options = {"ignored": 0.0, **options}
    return _case("x".join(map(str, sizes)) + end, why, sizes, large=True, **options)


def _strided(make: Make) -> tuple[Tensor | None, ...]:
    weight = make.transposed(40, 24, scale=0.2)
    return make.strided(5, 24), weight, make.labels(5, 40, 0.2), None, None


#: every option that is a number, and every input
NUMBERS: dict[str, Any] = {
    "lse_square_scale": 1e-3,
    "label_smoothing": 0.1,
    "softcap": 20.0,
    "weighted": True,
    "biased": True,
}
ALL: dict[str, Any] = {**NUMBERS, **REPORTS}
SUM: dict[str, Any] = {"reduction": "sum"}
SCALED: dict[str, Any] = {"use_token_scaling": True}
THREES: dict[str, Any] = {"chunk_size": 3}
LLAMA = (8192, 4096, 128256)
#: whose head it is, its sizes, options
HEADS: tuple[tuple[str, Sizes, dict[str, Any]], ...] = (
    ("Llama-3-8B", LLAMA, {}),
    ("Qwen3-1.7B", (16384, 2048, 151936), {}),
    ("Llama-2-7B", (8192, 4096, 32000), {}),
    ("Gemma-2-2B", (4096, 2304, 256000), {"softcap": 30.0}),
    ("Qwen2.5-0.5B", (2048, 896, 151936), {}),
    ("Llama-3.2-1B, long", (32768, 2048, 128256), {}),
    ("Llama-3-8B with one token more", (8192, 4096, 128257), {}),
    ("GPT-2", (16384, 768, 50257), {}),
)
SMALL = (
    _case("mean", "the usual call, one chunk, odd number of classes", (5, 24, 301)),
    _case("chunks", "two full chunks and a part of one", (7, 16, 90), **THREES, **REPORTS),
    _case("bias", "its gradient over three chunks", (7, 16, 60), biased=True, **THREES),
    _case("sum", "no division", (5, 16, 60), biased=True, **SUM, **THREES, **REPORTS),
    _case("none", "recomputed in chunks", (5, 16, 60), biased=True, **NONE, **THREES, **REPORTS),
    _case("fp32-sum", "explicitly", (7, 16, 60), accum_dtype=torch.float32, **THREES),
    _case("budget", "chunks of one row", (3, 16, 64), memory_budget=64 * 4),
    _case("all-mean", "every option at once", (5, 16, 77), **THREES, **ALL),
    _case("all-sum", "every option at once", (5, 16, 77), **SUM, **ALL),
    _case("all-none", "every option at once", (5, 16, 77), chunk_size=2, **NONE, **ALL),
    _case("token-scaling", "by the probability", (7, 16, 60), **SCALED, **THREES, **REPORTS),
    _case("token-scaling-all", "likewise, every option", (5, 16, 60), **SCALED, **SUM, **NUMBERS),
    _case("token-scaling-none", "likewise, per row", (5, 16, 60), **SCALED, **NONE, **NUMBERS),
    _case("one-row", "one row", (1, 16, 50), ignored=0.0),
    _case("no-rows", "gradients of zero, not of garbage", (0, 16, 50), biased=True, **REPORTS),
    _case("no-rows-none", "likewise, recomputed", (0, 16, 50), biased=True, **NONE),
    _case("all-ignored", "gradients of zero", (5, 16, 50), ignored=1.0, chunk_size=2, **ALL),
    _case("ignore-class-0", "ignore_index may be a class", (7, 16, 5), ignore_index=0, **THREES),
    case("strided", "hidden states and weight of other layouts", _strided, chunk_size=4),
    _case("counted", "rows left out", (40, 16, 60), ignored=0.8, label_count=20, **REPORTS),
)
LARGE = (
    *(_large(sizes, whose, **options) for whose, sizes, options in HEADS),
    _large(LLAMA, "a tenth of the labels counts", "-ignored90", ignored=0.9, label_count=1024),
    _large(
        LLAMA,
        "the running sum rounded at every chunk: less memory, more error",
        "-bf16-dW",
        accum_dtype=torch.bfloat16,
        chunk_size=2048,
    ),
    *(
        _large(sizes, f"adapters on {whose}: no dW", "-frozen-head", frozen=(1,), **options)
        for whose, sizes, options in (HEADS[0], HEADS[3])
    ),
    *(
        _large((rows, hidden, classes), "is another way faster in a corner?", sweep=True)
        for classes in (32000, 128256, 256000)
        for hidden in (1024, 4096 if classes == 256000 else 8192)
        for rows in (1024, 8192, 32768, 131072)
        if rows * hidden * classes < 2**46  # a third of a second
    ),
)
SPEC = OpSpec(
    name="fused_linear_cross_entropy",
    function=fused_linear_cross_entropy,
    reference=reference.fused_linear_cross_entropy,
    cases=(*SMALL, *LARGE),
    differentiable=(0, 1, 3),
    outputs_without_grad=(1, 2, 3),
    elementwise=(0, 1),
)
