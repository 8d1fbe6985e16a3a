"""Multi-token attention beyond the cases: the module, causality, extreme scores, what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from liger_kernel.backends import use_implementation
from liger_kernel.functional import multi_token_attention
from liger_kernel.ops.multi_token_attention import reference, triton
from liger_kernel.ops.multi_token_attention.cases import SPEC
from liger_kernel.testing import Make, OpCase, assert_no_worse
from liger_kernel.testing.calls import assert_as_exact
from liger_kernel.transformers import LigerMultiTokenAttention
from liger_kernel.transformers.functional import liger_multi_token_attention

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def test_the_module() -> None:
    torch.manual_seed(0)
    module = LigerMultiTokenAttention(4, 6, 3, padding=1, groups=2, sparse=True)
    conv = torch.nn.Conv2d(4, 6, 3, padding=1, groups=2)
    assert module.weight.shape == conv.weight.shape
    assert module.weight.abs().max() <= conv.weight.abs().max() * 1.2
    assert not module.bias.any()
    scores = Make(torch.float32).randn(2, 4, 7, 7)
    found = liger_multi_token_attention(scores, module.weight, module.bias, 1, 1, 1, 2, True)
    assert torch.equal(module(scores), found)
    assert LigerMultiTokenAttention(2, 2, 3, bias=False).bias is None
    assert "4, 6, kernel_size=(3, 3)" in repr(module)


@pytest.mark.parametrize("sparse", [False, True])
def test_scores_of_later_keys_have_no_effect(sparse: bool) -> None:
    """Nor any that is no number; and a score far below the others is no mask."""
    scores = Make(torch.float32).randn(1, 2, 6, 6)
    weight = Make(torch.float32, seed=1).randn(2, 2, 3, 3)
    scores[..., 0, 0] = -2e9
    other = scores.masked_fill(torch.ones(6, 6, dtype=torch.bool).triu(1), float("inf"))
    leaf = other.requires_grad_()
    found = multi_token_attention(leaf, weight, padding=1, sparse=sparse)
    assert torch.equal(found, multi_token_attention(scores, weight, padding=1, sparse=sparse))
    found.square().sum().backward()
    assert leaf.grad.isfinite().all()
    assert not leaf.grad.triu(1).any()
    assert not found.triu(1).any()


def test_autocast() -> None:
    """The convolution runs in 16 bits, and gradients come in the dtype of what they are of."""
    make = Make(torch.float32)
    tensors = [make.randn(*s).requires_grad_() for s in ((1, 2, 9, 9), (2, 2, 3, 3), (2,))]

    def run(function: Any, dtype: torch.dtype = torch.float32) -> list[Tensor]:
        leaves = [t.detach().to(dtype).requires_grad_() for t in tensors]
        y = function(*leaves, padding=1)
        return [y, *torch.autograd.grad(y.float().square().sum(), leaves)]

    def composed(scores: Tensor, *parameters: Tensor, padding: int) -> Tensor:
        options = (1, padding, 1, 1, False)
        return reference.multi_token_attention(scores, *parameters, *options)

    high = run(composed, torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        found, low = run(multi_token_attention), run(composed)
    for i, t in enumerate(found):
        assert_no_worse(f"{i}", t, high[i], low[i])


@pytest.mark.parametrize("sparse", [False, True])
def test_a_row_without_numbers_reaches_no_further_than_the_kernel(sparse: bool) -> None:
    """Of weights that are NaN, those right of the diagonal are 0 all the same; and so is what is returned there."""
    make = Make(torch.float32)
    scores, weight = make.randn(1, 1, 9, 9), make.randn(1, 1, 5, 3)
    scores[..., 4, 1] = float("nan")
    y = multi_token_attention(scores, weight, padding=(2, 1), sparse=sparse)
    expected = reference.multi_token_attention(scores, weight, None, 1, (2, 1), 1, 1, sparse)
    assert torch.equal(y.isnan(), expected.isnan())
    assert y[0, 0, 2, :3].isnan().all()
    assert not y[0, 0, 6].isnan()[6:].any()
    assert not y.triu(1).any()


def test_several_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Along rows, columns, sums and programs, of which those of a case are one."""
    monkeypatch.setattr(triton, "CONVOLVE", triton.Tile(4, 4, 16, warps=4))
    monkeypatch.setattr(triton, "WEIGH", triton.Tile(4, 4, 16, warps=4))
    monkeypatch.setattr(triton, "PROGRAMS", 5)
    with use_implementation("triton"):
        make = Make(torch.float32, DEVICE)
        tensors = make.randn(1, 16, 19, 19), make.randn(2, 16, 1, 3), make.randn(2)
        options = {"stride": 1, "padding": (0, 1), "dilation": 1, "groups": 1, "sparse": False}
        case = OpCase("several-tiles", "", SPEC.cases[0].inputs, options)
        assert_as_exact(SPEC, case, tensors, {0: make.randn(1, 2, 19, 19)})


def test_refused() -> None:
    scores, weight = torch.ones(1, 2, 5, 5), torch.ones(2, 2, 3, 5)
    with pytest.raises(ValueError, match=r"makes \(1, 2, 3, 1\) of scores \(1, 2, 5, 5\)"):
        multi_token_attention(scores, weight)
    with pytest.raises(ValueError, match=r"scores has shape \(1, 2, 5, 4\); pass \(B, C, L, L\)"):
        multi_token_attention(scores[..., :4], weight)
    with pytest.raises(
        ValueError, match=r"weight \(2, 2, 3, 5\), bias \(3,\) do not fit each other with groups=1"
    ):
        multi_token_attention(scores, weight, torch.ones(3), padding=(1, 2))
    with pytest.raises(ValueError, match="do not fit each other with groups=2"):
        multi_token_attention(scores, weight, groups=2)
    with pytest.raises(ValueError, match=r"padding='same' with stride=\(2, 2\)"):
        multi_token_attention(scores, weight, padding="same", stride=2)
    with pytest.raises(ValueError, match="have to be 1 or more"):
        multi_token_attention(scores, weight, padding=(-1, 0))
    with pytest.raises(TypeError, match=r"weight torch\.bfloat16 differ; pass one dtype"):
        multi_token_attention(scores, weight.bfloat16(), padding=(1, 2))
    with pytest.raises(TypeError, match="floating"):
        multi_token_attention(scores.long(), weight)
