"""The tiled MLP modules: plain, with biases, adapters or frozen weights. test_distributed.py has them on two ranks."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from liger_kernel.testing import Make, assert_no_worse
from liger_kernel.transformers import (
    LigerGEGLUMLP,
    LigerSwiGLUMLP,
    LigerTiledGEGLUMLP,
    LigerTiledSwiGLUMLP,
)
from tests.transformers.tiled import Adapted, config, step

PAIRS = [
    (LigerTiledSwiGLUMLP, LigerSwiGLUMLP, "silu"),
    (LigerTiledGEGLUMLP, LigerGEGLUMLP, "gelu_pytorch_tanh"),
]


@pytest.mark.parametrize("how", ["plain", "biased", "adapted", "frozen"])
@pytest.mark.parametrize(("tiled", "whole", "act"), PAIRS)
def test_computes_what_the_untiled_block_computes(
    tiled: Any, whole: Any, act: str, how: str
) -> None:
    def build(cls: Any, dtype: torch.dtype = torch.float32) -> nn.Module:
        torch.manual_seed(0)
        of_tiles = {"num_shards": 4} if cls is tiled else {}
        model: nn.Module = cls(config(act, mlp_bias=how == "biased"), **of_tiles)
        if how == "adapted":
            model.up_proj = Adapted(16, 40)
        if how == "frozen":
            model.down_proj.requires_grad_(False)
        return model.to(dtype)

    x = Make(torch.float32).randn(3, 29, 16)
    ours, low = step(build(tiled), x), step(build(whole), x)
    high = step(build(whole, torch.float64), x.double())
    assert ours.keys() == low.keys()
    for name, value in ours.items():
        assert_no_worse(name, value, high[name], low[name])


def test_refused() -> None:
    with pytest.raises(
        ValueError, match="LigerTiledSwiGLUMLP requires SiLU/Swish activation, got 'gelu'"
    ):
        LigerTiledSwiGLUMLP(config("gelu"))
    with pytest.raises(ValueError, match="LigerTiledGEGLUMLP requires GELU activation, got 'silu'"):
        LigerTiledGEGLUMLP(config("silu"))
    LigerTiledSwiGLUMLP(SimpleNamespace(hidden_size=4, intermediate_size=8))


def test_the_dtype_of_the_input_is_checked_as_by_a_linear_layer() -> None:
    with pytest.raises(RuntimeError, match="dtype"):
        LigerTiledSwiGLUMLP(config())(torch.ones(3, 16, dtype=torch.bfloat16))
