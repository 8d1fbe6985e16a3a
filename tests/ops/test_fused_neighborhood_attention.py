"""Neighbourhood attention beyond the cases: memory, the modules, what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from liger_kernel.transformers.fused_neighborhood_attention import (
    LigerFusedNeighborhoodAttention,
    LigerFusedNeighborhoodAttentionConfig,
    LigerFusedNeighborhoodAttentionLayer,
)
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from liger_kernel import ops
from liger_kernel.functional import fused_neighborhood_attention
from liger_kernel.testing import Make, assert_no_worse
from liger_kernel.transformers.functional import liger_fused_neighborhood_attention


class Largest(TorchDispatchMode):
    """Elements of the largest tensor that is made."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        for t in found if isinstance(found, (tuple, list)) else (found,):
            if isinstance(t, Tensor):
                self.elements = max(self.elements, t.untyped_storage().nbytes() // t.element_size())
        return found


@pytest.mark.parametrize(("kernel_size", "dilation"), [(7, 1), (7, 5), (65, 1)])
def test_memory_is_that_of_the_window(kernel_size: int, dilation: int) -> None:
    length, heads = 4096, 2
    inputs = [Make(torch.float32).randn(1, heads, length, 4).requires_grad_() for _ in "qkv"]
    with Largest() as seen:
        fused_neighborhood_attention(*inputs, kernel_size, dilation).sum().backward()
    assert seen.elements <= heads * length * max(48, 3 * kernel_size) * 1.1


def by_hand(module: LigerFusedNeighborhoodAttention, x: Tensor) -> Tensor:
    q, k, v = (
        project(x).unflatten(-1, (module.num_heads, -1)).transpose(1, 2)
        for project in (module.q_proj, module.k_proj, module.v_proj)
    )
    at = torch.arange(x.shape[1])
    apart = (at[:, None] - at).abs()
    visible = (apart <= module.kernel_size // 2 * module.dilation) & (apart % module.dilation == 0)
    bias = torch.zeros(visible.shape, dtype=x.dtype).masked_fill(~visible, float("-inf"))
    found = nn.functional.scaled_dot_product_attention(q, k, v, bias, scale=module.scale)
    return module.out_proj(found.transpose(1, 2).flatten(-2))


def test_the_modules() -> None:
    torch.manual_seed(0)
    layer = LigerFusedNeighborhoodAttentionLayer(12, 3, 5, 2, dropout=0.5, scale=0.3).eval()
    assert "num_heads=3" in repr(layer)
    assert "dropout=0.5" in repr(layer)
    x = Make(torch.float32).randn(2, 41, 12)
    found = layer(x)
    low = x + by_hand(layer.attention, layer.layer_norm(x))
    layer.double()
    high = x.double() + by_hand(layer.attention, layer.layer_norm(x.double()))
    assert_no_worse("layer", found, high, low)
    assert not torch.equal(layer.float().train()(x), found)
    assert LigerFusedNeighborhoodAttention(8, 2).dropout is None
    config = LigerFusedNeighborhoodAttentionConfig(num_heads=4).to_dict()
    assert config == {
        **{"hidden_size": 768, "num_heads": 4, "kernel_size": 7, "dilation": 1, "bias": True},
        **{"dropout": 0.0, "layer_norm_eps": 1e-5, "scale": None},
    }
    LigerFusedNeighborhoodAttentionLayer(**config)


def test_the_helper_gives_no_weights_of_all_pairs() -> None:
    q, k, v = (Make(torch.float32, seed=i).randn(1, 2, 9, 4).requires_grad_() for i in range(3))
    found = ops.fused_neighborhood_attention_forward(q, k, v, 3, 2)
    expected = liger_fused_neighborhood_attention(q, k, v, 3, 2)
    assert torch.equal(found[0], expected)
    assert found[1:] == (None, None)
    assert not found[0].requires_grad
    with pytest.raises(NotImplementedError, match="return_lse=True"):
        ops.fused_neighborhood_attention_forward(q, k, v, return_lse=True)


def test_autocast() -> None:
    tensors = [Make(torch.float32, seed=i).randn(1, 2, 50, 8) for i in range(3)]
    mixed = (tensors[0].bfloat16(), *tensors[1:])
    with torch.autocast("cpu", torch.bfloat16):
        found = fused_neighborhood_attention(*mixed, 3)
    wide = [t.double() for t in mixed]
    low = fused_neighborhood_attention(*(t.bfloat16() for t in tensors), 3)
    assert_no_worse("autocast", found, fused_neighborhood_attention(*wide, 3), low)


def test_refused() -> None:
    x = torch.ones(1, 2, 5, 4)
    with pytest.raises(ValueError, match=r"query \(1, 2, 5, 4\), key \(1, 2, 4, 4\)"):
        fused_neighborhood_attention(x, x[:, :, :4], x)
    with pytest.raises(ValueError, match="kernel_size=0 and dilation=1 must be at least 1"):
        fused_neighborhood_attention(x, x, x, 0)
    with pytest.raises(ValueError, match="kernel_size=3 and dilation=0 must be"):
        fused_neighborhood_attention(x, x, x, 3, 0)
    with pytest.raises(TypeError, match=r"key is torch\.bfloat16"):
        fused_neighborhood_attention(x, x.bfloat16(), x)
    for arguments, said in (
        ((10, 3), r"hidden_size \(10\) must be divisible by num_heads \(3\)"),
        ((8, 2, 0), r"kernel_size \(0\) must be positive"),
        ((8, 2, 4), r"kernel_size \(4\) must be odd"),
        ((8, 2, 3, 0), r"dilation \(0\) must be positive"),
    ):
        with pytest.raises(ValueError, match=said):
            LigerFusedNeighborhoodAttention(*arguments)
    with pytest.raises(NotImplementedError, match="Attention mask is not yet supported"):
        LigerFusedNeighborhoodAttention(8, 2)(x[:, 0].repeat(1, 1, 2), torch.ones(1))
