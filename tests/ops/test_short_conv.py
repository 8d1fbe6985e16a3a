"""The gated short convolution against torch's own, its module, and what is refused."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from liger_kernel.backends import use_implementation
from liger_kernel.functional import short_conv
from liger_kernel.testing import Make, assert_no_worse
from liger_kernel.transformers import LigerShortConv

MAKE = Make(torch.float32)


def by_torch(bcx: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """With `F.conv1d`, as LFM2 is written."""
    b, c, x = bcx.transpose(-1, -2).chunk(3, -2)
    taps, steps = weight.shape[1], bcx.shape[-2]
    conv = F.conv1d(b * x, weight[:, None], bias, padding=taps - 1, groups=len(weight))
    return (c * conv[..., :steps]).transpose(-1, -2)


@pytest.mark.usefixtures("on_the_kernels_device")
@pytest.mark.parametrize("taps", [3, 4, 5])  # five are the reference's, whatever was asked for
def test_as_torch_convolves(taps: int) -> None:
    make = Make(torch.float32)
    given = make.randn(2, 7, 24), make.randn(8, taps), make.randn(8)
    g = make.randn(2, 7, 8)
    found = []
    for function, dtype in ((short_conv, g.dtype), (by_torch, torch.float64), (by_torch, g.dtype)):
        leaves = [t.detach().to(dtype).requires_grad_() for t in given]
        with use_implementation("triton"):
            y = function(*leaves)
            found.append((y, *torch.autograd.grad(y, leaves, g.to(dtype))))
    earlier = short_conv(given[0][:, :3], *given[1:])
    assert torch.equal(earlier, short_conv(*given)[:, :3])  # no token sees a later one
    for ours, high, low in zip(*found, strict=True):
        assert_no_worse(f"{taps} taps", ours, high, low)


def test_module() -> None:
    module = LigerShortConv(8, 4, bias=True)
    x = MAKE.randn(2, 6, 8)
    y = module(x)
    conv, bcx = module.conv, module.in_proj(x)
    assert torch.equal(y, module.out_proj(short_conv(bcx, conv.weight[:, 0], conv.bias)))
    assert torch.equal(copy.deepcopy(module)(x), y)
    assert LigerShortConv(8).conv.weight.shape == (8, 1, 3)


def test_compiles_to_one_graph() -> None:
    torch._dynamo.reset()
    module = LigerShortConv(8)
    x = MAKE.randn(2, 6, 8)
    compiled = torch.compile(module, fullgraph=True, backend="eager")
    assert torch.equal(compiled(x), module(x))


def test_what_is_refused() -> None:
    bcx, weight = MAKE.randn(2, 6, 24), MAKE.randn(8, 3)
    for wrong in (
        (bcx[..., 1:], weight),
        (bcx, weight[1:]),
        (bcx, weight[:, None]),
        (bcx, weight[:, :0]),
        (bcx, weight, weight[1:, 0]),
        (bcx[0, 0], weight),
    ):
        with pytest.raises(ValueError, match=r"do not fit each other; pass \(..., S, 3 C\)"):
            short_conv(*wrong)
    with pytest.raises(TypeError, match=r"weight must have a floating dtype, got torch.int64"):
        short_conv(bcx, weight.long())
