"""Inputs of fused linear cross entropy for tests and benchmarks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from liger_kernel.loss_head.fused_linear_cross_entropy import fused_linear_cross_entropy, reference
from liger_kernel.testing import Make, OpCase, OpSpec

EVERYTHING: dict[str, Any] = {
    "return_z_loss": True,
    "return_token_accuracy": True,
    "return_predicted_tokens": True,
}
ALL: dict[str, Any] = {
    "lse_square_scale": 1e-3,
    "label_smoothing": 0.1,
    "softcap": 20.0,
    "weighted": True,
    "biased": True,
}


def _case(
    id: str,
    why: str,
    rows: int,
    hidden: int,
    classes: int,
    *,
    ignored: float = 0.3,
    biased: bool = False,
    weighted: bool = False,
    large: bool = False,
    sweep: bool = False,
    frozen: tuple[int, ...] = (),
    **options: Any,
) -> OpCase:
    """Hidden states that point at the embedding of one class each, so that no rounding changes the prediction."""

    def inputs(make: Make) -> tuple[Tensor | None, ...]:
        labels = make.labels(rows, classes, ignored, options.get("ignore_index", -100))
        weight = make.randn(classes, hidden, scale=hidden**-0.5)
        towards = torch.where(
            make.integers(2, rows) == 0, labels.clamp(min=0), make.integers(classes, rows)
        )
        states = 8 * weight[towards] + make.randn(rows, hidden, scale=0.3)
        return (
            states,
            weight,
            labels,
            make.randn(classes, scale=0.3) if biased else None,
            make.randn(classes).abs() + 0.1 if weighted else None,
        )

    used, products = options.get("label_count", rows), 3 - len(frozen)
    return OpCase(
        id,
        why,
        inputs,
        options,
        flops=2 * products * used * hidden * classes,
        large=large,
        sweep=sweep,
        frozen=frozen,
    )


def _strided(make: Make) -> tuple[Tensor | None, ...]:
    return (
        make.strided(5, 24),
        make.transposed(40, 24, scale=0.2),
        make.labels(5, 40, 0.2),
        None,
        None,
    )


#: tokens, hidden size, classes, whose head it is, options
HEADS: tuple[tuple[int, int, int, str, dict[str, Any]], ...] = (
    (8192, 4096, 128256, "Llama-3-8B", {}),
    (16384, 2048, 151936, "Qwen3-1.7B", {}),
    (8192, 4096, 32000, "Llama-2-7B", {}),
    (4096, 2304, 256000, "Gemma-2-2B", {"softcap": 30.0}),
    (2048, 896, 151936, "Qwen2.5-0.5B", {}),
    (32768, 2048, 128256, "Llama-3.2-1B, long", {}),
    (8192, 4096, 128257, "Llama-3-8B with one token more", {}),
    (16384, 768, 50257, "GPT-2", {}),
)

SPEC = OpSpec(
    name="fused_linear_cross_entropy",
    function=fused_linear_cross_entropy,
    reference=reference.fused_linear_cross_entropy,
    differentiable=(0, 1, 3),
    outputs_without_grad=(1, 2, 3),
    elementwise=(0, 1),
    cases=(
        _case("mean", "the usual call, one chunk, odd number of classes", 5, 24, 301),
        _case("chunks", "two full chunks and a part of one", 7, 16, 90, chunk_size=3, **EVERYTHING),
        _case("bias", "bias, its gradient over three chunks", 7, 16, 60, biased=True, chunk_size=3),
        _case(
            "sum",
            "no division",
            5,
            16,
            60,
            biased=True,
            reduction="sum",
            chunk_size=3,
            **EVERYTHING,
        ),
        _case(
            "none",
            "backward recomputes, chunked",
            5,
            16,
            60,
            biased=True,
            reduction="none",
            chunk_size=3,
            **EVERYTHING,
        ),
        _case(
            "fp32-sum",
            "explicit fp32 running sum",
            7,
            16,
            60,
            chunk_size=3,
            accum_dtype=torch.float32,
        ),
        _case("budget", "chunks of one row", 3, 16, 64, memory_budget=64 * 4),
        _case("all-mean", "every option at once", 5, 16, 77, chunk_size=3, **ALL, **EVERYTHING),
        _case("all-sum", "every option at once", 5, 16, 77, reduction="sum", **ALL, **EVERYTHING),
        _case(
            "all-none",
            "every option at once",
            5,
            16,
            77,
            reduction="none",
            chunk_size=2,
            **ALL,
            **EVERYTHING,
        ),
        _case(
            "token-scaling",
            "weighted by the probability",
            7,
            16,
            60,
            chunk_size=3,
            use_token_scaling=True,
            **EVERYTHING,
        ),
        _case(
            "token-scaling-all",
            "likewise, every option",
            5,
            16,
            60,
            use_token_scaling=True,
            reduction="sum",
            **ALL,
        ),
        _case(
            "token-scaling-none",
            "likewise, per row",
            5,
            16,
            60,
            use_token_scaling=True,
            reduction="none",
            **ALL,
        ),
        _case("one-row", "one row", 1, 16, 50, ignored=0.0),
        _case(
            "no-rows",
            "empty batch: gradients of zero, not of garbage",
            0,
            16,
            50,
            biased=True,
            **EVERYTHING,
        ),
        _case("no-rows-none", "likewise, recomputed", 0, 16, 50, biased=True, reduction="none"),
        _case(
            "all-ignored",
            "gradients of zero",
            5,
            16,
            50,
            ignored=1.0,
            chunk_size=2,
            **ALL,
            **EVERYTHING,
        ),
        _case(
            "ignore-class-0", "ignore_index may be a class", 7, 16, 5, ignore_index=0, chunk_size=3
        ),
        OpCase(
            "strided",
            "strided hidden states, weight of a transposed layout",
            _strided,
            {"chunk_size": 4},
        ),
        _case(
            "counted", "most rows left out", 40, 16, 60, ignored=0.8, label_count=20, **EVERYTHING
        ),
        *(
            _case(f"{n}x{hidden}x{classes}", why, n, hidden, classes, ignored=0.0, large=True, **o)
            for n, hidden, classes, why, o in HEADS
        ),
        _case(
            "8192x4096x128256-ignored90",
            "long prompts: a tenth of the labels counts",
            8192,
            4096,
            128256,
            ignored=0.9,
            label_count=1024,
            large=True,
        ),
        _case(
            "8192x4096x128256-bf16-dW",
            "the running sum rounded at every chunk: less memory, more error",
            8192,
            4096,
            128256,
            ignored=0.0,
            accum_dtype=torch.bfloat16,
            chunk_size=2048,
            large=True,
        ),
        *(
            _case(
                f"{n}x{hidden}x{classes}-frozen-head",
                f"adapters on {whose}: no gradient of the head, and no memory for one",
                n,
                hidden,
                classes,
                ignored=0.0,
                large=True,
                frozen=(1,),
                **o,
            )
            for n, hidden, classes, whose, o in (HEADS[0], HEADS[3])
        ),
        *(
            _case(
                f"{rows}x{hidden}x{classes}",
                "is there a corner where another way is faster?",
                rows,
                hidden,
                classes,
                ignored=0.0,
                large=True,
                sweep=True,
            )
            for hidden, classes in (
                (1024, 32000),
                (8192, 32000),
                (1024, 128256),
                (8192, 128256),
                (1024, 256000),
                (4096, 256000),
            )
            for rows in (1024, 8192, 32768, 131072)
            if rows * hidden * classes < 2**46  # a third of a second
        ),
    ),
)
