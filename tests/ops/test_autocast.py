"""Autocast narrows float32, and leaves float64 alone: what computes in its dtype has to do so, too."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from liger_kernel import functional

OPS: dict[str, Callable[[Tensor], Tensor]] = {
    "lora_linear": lambda x: functional.lora_linear(x, x, None, x, x, 0.5),
    "fused_moe": lambda x: functional.fused_moe(
        x,
        x.repeat(2, 2, 1),
        x.repeat(2, 1, 1),
        torch.tensor([[0, 1]], device=x.device).expand(len(x), 2),
        x[:, :2].softmax(-1),
    ),
    "multi_token_attention": lambda x: functional.multi_token_attention(
        x[None, None], x[None, None, :3, :3]
    ),
    "gated_mlp": lambda x: functional.gated_mlp(x, x, x, x),
    "fused_linear_cross_entropy": lambda x: functional.fused_linear_cross_entropy(
        x, x, torch.arange(len(x), device=x.device)
    )[0],
}


@pytest.mark.parametrize("name", OPS)
def test_float64_stays(name: str) -> None:
    x = torch.linspace(-2, 2, 64, dtype=torch.float64).sin().view(8, 8)
    outside = OPS[name](x)
    with torch.autocast("cpu", torch.bfloat16):
        inside = OPS[name](x)
    assert inside.dtype == torch.float64
    assert torch.equal(inside, outside)
