"""Inputs of the mixture of experts for tests and benchmarks."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from liger_kernel.ops.fused_moe import fused_moe, reference
from liger_kernel.testing import Make, OpCase, OpSpec, case


def _routed(make: Make, tokens: int, top_k: int, experts: int, routing: str) -> Tensor:
    """(T, K) indices, different ones for a token; in "zipf" and "one" some experts are wanted more."""
    generator = torch.Generator("cpu").manual_seed(make.seed)
    rand = partial(torch.rand, generator=generator, device="cpu")
    logits = rand(tokens, experts).log().neg().log().neg()  # Gumbel
    if routing == "zipf":
        logits -= torch.arange(1, experts + 1, device="cpu").log()
    if routing == "one":
        logits[:, 1:] -= 100.0
    index = logits.topk(top_k).indices
    if routing == "sentinels":
        index = index.masked_fill(rand(index.shape) < 0.4, experts)
    return index.to(make.device)


def _case(
    id: str,
    why: str,
    tokens: int,
    experts: int,
    top_k: int,
    hidden: int,
    features: int,
    routing: str = "balanced",
    biases: bool = False,
    draw: Any = Make.randn,
    rank: int = 0,
    **options: Any,
) -> OpCase:
    gated, transposed = options.get("gated", True), options.get("transposed", False)

    def inputs(make: Make) -> tuple[Tensor | None, ...]:
        def weight(n_out: int, n_in: int, scale: float) -> Tensor:
            shape = (experts, n_in, n_out) if transposed else (experts, n_out, n_in)
            return draw(make, *shape, scale=scale * n_in**-0.5)

        def pair(n_in: int, n_out: int) -> tuple[Tensor, Tensor]:
            a = make.randn(experts * rank, n_in, scale=n_in**-0.5)
            b = make.randn(n_out, rank * experts, scale=0.3 * rank**-0.5)  # the layout of PEFT
            return a.view(experts, rank, n_in), b.view(n_out, rank, experts).permute(2, 0, 1)

        n_first = (1 + gated) * features
        x = draw(make, tokens, hidden)
        w1, w2 = weight(n_first, hidden, 2.0), weight(hidden, features, 1.0)
        index = _routed(make, tokens, top_k, experts, routing)
        b1, b2 = (make.randn(experts, n) if biases else None for n in (n_first, hidden))
        given = x, w1, w2, index, make.randn(tokens, top_k, scale=0.5), b1, b2
        if not rank:
            return *given, None, None, None, None
        return *given, *pair(hidden, n_first), *pair(features, hidden)

    flops = 6 * tokens * top_k * hidden * features * (2 + gated)
    return case(id, why, inputs, flops=flops, **options)


_GPT_OSS: Any = {
    "biases": True,
    "interleaved": True,
    "transposed": True,
    "limit": 2.5,
    "alpha": 1.702,
    "up_shift": 1.0,
}
_STRIDED: Any = {"draw": Make.strided, "activation": "gelu_tanh", "limit": 3.0}
_LORA: Any = {"frozen": (1, 2, 4), "gate_up_scaling": 2.0, "down_scaling": 0.5}
CASES = (
    _case("silu", "odd sizes, several tiles", 19, 3, 2, 24, 20),
    _case(
        "gpt-oss", "all options, and pairs of no expert", 17, 3, 3, 16, 12, "sentinels", **_GPT_OSS
    ),
    _case("one-token", "most experts without a row", 1, 4, 2, 16, 8, activation="gelu"),
    _case(
        "no-gate",
        "all tokens to one expert",
        21,
        2,
        1,
        16,
        8,
        "one",
        activation="relu_squared",
        gated=False,
    ),
    _case("strided", "weights and tokens with gaps; a limit", 6, 2, 2, 16, 8, **_STRIDED),
    _case("lora", "low ranks, no power of two", 17, 2, 1, 24, 20, rank=5, **_LORA),
    _case(
        "lora-gpt-oss",
        "low ranks beside all options, and a trained bias",
        5,
        3,
        2,
        24,
        20,
        "sentinels",
        rank=3,
        **{**_LORA, "frozen": (1, 2), **_GPT_OSS},
    ),
    _case("even", "whole tiles, which a copy engine reads", 40, 3, 2, 64, 64, "zipf"),
    _case(
        "even-lora",
        "likewise beside low ranks, of a transposed weight",
        20,
        3,
        2,
        64,
        32,
        rank=5,
        transposed=True,
        **_LORA,
    ),
    _case("no-rows", "empty batch: gradients of zero, not of garbage", 0, 2, 2, 16, 8),
    _case("qwen3-30b-a3b-1k", "Qwen3-30B-A3B", 1024, 128, 8, 2048, 768, large=True),
    _case("qwen3-30b-a3b-8k", "Qwen3-30B-A3B", 8192, 128, 8, 2048, 768, large=True),
    _case("qwen3-30b-a3b-32k", "Qwen3-30B-A3B", 32768, 128, 8, 2048, 768, large=True),
    _case("qwen3-30b-a3b-8k-zipf", "skewed", 8192, 128, 8, 2048, 768, "zipf", large=True),
    _case("qwen3-30b-a3b-lora-4k", "", 4096, 128, 8, 2048, 768, rank=16, large=True, **_LORA),
    _case("mixtral-8k", "Mixtral 8x7B", 8192, 8, 2, 4096, 14336, large=True),
    _case("gpt-oss-8k", "gpt-oss-20b", 8192, 32, 4, 2880, 2880, large=True, **_GPT_OSS),
)


def _call(*tensors: Any, **options: Any) -> Tensor:
    """Low ranks as tensors behind the others, as the reference takes them."""
    a1, b1, a2, b2 = tensors[7:]
    options["gate_up_lora"] = None if a1 is None else (a1, b1)
    options["down_lora"] = None if a2 is None else (a2, b2)
    return fused_moe(*tensors[:7], **options)


SPEC = OpSpec(
    name="fused_moe",
    function=_call,
    reference=reference.fused_moe,
    cases=CASES,
    differentiable=(0, 1, 2, *range(4, 11)),
    defaults={
        "activation": "silu",
        "gated": True,
        "interleaved": False,
        "transposed": False,
        "limit": None,
        "alpha": 1.0,
        "up_shift": 0.0,
        "gate_up_scaling": 1.0,
        "down_scaling": 1.0,
    },
)
