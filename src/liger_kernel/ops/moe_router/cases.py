"""Inputs of the router for tests and benchmarks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from liger_kernel.ops.moe_router import moe_router, reference
from liger_kernel.testing import Make, OpCase, OpSpec, case


def _case(
    id: str, why: str, tokens: int, experts: int, top_k: int, bias: bool = False, **options: Any
) -> OpCase:
    def inputs(make: Make) -> tuple[Tensor | None, ...]:
        # no two alike in any dtype: among equals, whoever chooses is right
        generator = torch.Generator("cpu").manual_seed(make.seed)
        order = torch.rand(tokens, experts, generator=generator, device="cpu").argsort(-1)
        logits = (order.float() * (8 / experts) - 5).to(make.device, make.dtype)
        return logits, make.randn(experts, scale=0.1) if bias else None

    return case(id, why, inputs, top_k=top_k, **options)


_DEEPSEEK: Any = {"score": "sigmoid", "n_groups": 4, "groups_kept": 2, "scale": 2.5, "bias": True}
CASES = (
    _case("softmax", "several tiles, normalised", 150, 16, 3),
    _case("scores", "experts that fill no power of 2, not normalised", 9, 13, 2, normalize=False),
    _case("deepseek", "groups and a bias", 37, 16, 4, **_DEEPSEEK),
    _case("groups-of-one", "no second best", 5, 4, 1, **_DEEPSEEK),
    _case("odd-groups", "left to the reference", 5, 12, 2, **{**_DEEPSEEK, "n_groups": 3}),
    _case(
        "sigmoid", "all experts, as they are", 7, 8, 8, score="sigmoid", normalize=False, scale=0.5
    ),
    _case("no-rows", "empty batch", 0, 8, 2),
    _case("qwen3-30b-a3b", "Qwen3-30B-A3B", 32768, 128, 8, large=True),
    _case(
        "deepseek-v3",
        "256 experts in 8 groups; of more tokens some have two that are equal to the last digit of fp32",
        8192,
        256,
        8,
        large=True,
        **{**_DEEPSEEK, "n_groups": 8},
    ),
)
SPEC = OpSpec(
    name="moe_router",
    function=moe_router,
    reference=reference.moe_router,
    cases=CASES,
    differentiable=(0,),
    outputs_without_grad=(1,),
    defaults={
        "score": "softmax",
        "n_groups": 1,
        "groups_kept": 1,
        "normalize": True,
        "scale": 1.0,
    },
    traffic=(3, (0,)),
)
