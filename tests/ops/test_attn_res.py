"""Attention residuals: the incumbent's helpers, lists of blocks, and what is refused."""

from __future__ import annotations

import pytest
import torch

from liger_kernel.compat.ops import attn_res as compat
from liger_kernel.functional import attn_res
from liger_kernel.testing import Make
from liger_kernel.transformers.functional import liger_attn_res

MAKE = Make(torch.float32)
BLOCKS, QUERY, NORM = MAKE.randn(3, 2, 5, 8), MAKE.randn(8), MAKE.randn(8)


def test_helpers_and_lists() -> None:
    leaves = [t.clone().requires_grad_() for t in (BLOCKS, QUERY, NORM)]
    expected = attn_res(*leaves)
    assert torch.equal(liger_attn_res(list(BLOCKS), QUERY, NORM), expected)
    h, v, alpha, rstd = compat.attn_res_forward(list(BLOCKS), QUERY, NORM)
    assert torch.equal(h, expected)
    assert v.shape == (3, 10, 8)
    assert alpha.shape == rstd.shape == (10, 3)
    assert alpha.dtype == rstd.dtype == torch.float32
    again = torch.einsum("tn,ntd->td", alpha.double(), v.double()).view(h.shape)
    assert (again - h).abs().max() < 1e-5
    dh = MAKE.randn(*h.shape)
    found = compat.attn_res_backward(dh, v, QUERY, NORM, alpha, rstd)
    wanted = torch.autograd.grad(expected, leaves, dh)
    for a, b in zip(found, wanted, strict=True):
        assert torch.equal(a.flatten(), b.flatten())


def test_what_is_refused() -> None:
    with pytest.raises(ValueError, match=r"blocks has shape \(0, 5, 8\); pass at least one"):
        attn_res(torch.empty(0, 5, 8), QUERY, NORM)
    with pytest.raises(ValueError, match=r"w_query has shape \(7,\), but the last dimension"):
        attn_res(BLOCKS, QUERY[:7], NORM)
    with pytest.raises(TypeError, match=r"must have a floating dtype, got torch.int64"):
        attn_res(BLOCKS.long(), QUERY, NORM)
