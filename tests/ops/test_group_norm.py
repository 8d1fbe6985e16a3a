"""GroupNorm beyond the cases: outliers, the incumbent's helpers, the module, errors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from liger_kernel import ops
from liger_kernel.backends import use_implementation
from liger_kernel.ops.group_norm import group_norm, reference
from liger_kernel.testing import Make, assert_no_worse
from liger_kernel.transformers import LigerGroupNorm
from liger_kernel.transformers.functional import liger_group_norm

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
MAKE = Make(torch.bfloat16, DEVICE)
X, DY, WEIGHT, BIAS = (MAKE.randn(*n) for n in ((2, 6, 5, 4), (2, 6, 5, 4), (6,), (6,)))


@pytest.mark.parametrize("implementation", ["reference", "triton"])
def test_is_that_of_torch(implementation: str) -> None:
    x, weight, bias = (t.float() for t in (X, WEIGHT, BIAS))
    with use_implementation(implementation):
        y = group_norm(x, weight, bias, 3, 1e-5)
    high = F.group_norm(x.double(), 3, weight.double(), bias.double(), 1e-5)
    assert_no_worse("y", y, high, F.group_norm(x, 3, weight, bias, 1e-5))


@pytest.mark.parametrize("value", [0.0, 1e4])
def test_a_constant_group(value: float) -> None:
    """Its variance is 0, and never less."""
    x = torch.full((2, 4, 9000), value, device=DEVICE)
    with use_implementation("triton"):
        y = group_norm(x, None, None, 2, 1e-5)
    assert torch.equal(y, torch.zeros_like(x))


def test_the_first_tile_is_an_outlier() -> None:
    """Its mean serves as a guess of the mean."""
    x = Make(torch.float32, DEVICE).randn(1, 1, 40_000)
    x[..., :8192] += 100
    with use_implementation("triton"):
        y = group_norm(x, None, None, 1, 1e-5)
    high, low = (reference.group_norm(t, None, None, 1, 1e-5) for t in (x.double(), x))
    assert_no_worse("y", y, high, low)


@pytest.mark.parametrize("affine", [(WEIGHT, BIAS), (WEIGHT, None), (None, None)])
def test_helpers(affine: tuple[Any, Any]) -> None:
    leaves = [None if t is None else t.clone().requires_grad_() for t in (X, *affine)]
    with use_implementation("triton"):
        y = group_norm(*leaves, 3, 1e-5)
        wanted = torch.autograd.grad(y, [t for t in leaves if t is not None], DY)
    made, x, mean, rstd, _ = ops.group_norm_forward(X, 6, 3, *affine, 1e-5)
    assert torch.equal(made, y)
    assert (mean.shape, rstd.shape) == ((2, 3), (2, 3))
    found = ops.group_norm_backward(DY, x, *affine, mean, rstd, 6, 3)
    assert [grad is None for grad in found[1:]] == [p is None for p in affine]
    assert all(map(torch.equal, filter(torch.is_tensor, found), wanted))


def test_module() -> None:
    ours = LigerGroupNorm(6, 3, bias=True)
    assert (ours.weight.tolist(), ours.bias.tolist()) == ([1.0] * 6, [0.0] * 6)
    assert LigerGroupNorm(6, 3).bias is None
    assert LigerGroupNorm(6, 3, init_fn="zeros").weight.tolist() == [0.0] * 6
    assert "6, num_groups=3, eps=1e-06" in repr(ours)
    with pytest.raises(ValueError, match=r"num_groups=4 does not divide the 6 channels"):
        LigerGroupNorm(6, 4)
    with pytest.raises(ValueError, match=r"init_fn='twos'"):
        LigerGroupNorm(6, 3, init_fn="twos")
    for door in (ours, lambda x: liger_group_norm(x, None, None, 6, 3, 1e-5)):
        with pytest.raises(ValueError, match=r"\(2, 5, 5, 4\).*num_channels=6"):
            door(X[:, :5])


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        ((X, WEIGHT, BIAS, 4), ValueError, r"num_groups=4 does not divide the 6 channels"),
        ((X, WEIGHT, BIAS, 0), ValueError, r"num_groups=0 does not divide the 6 channels"),
        ((X, WEIGHT[:5], BIAS, 3), ValueError, r"weight has shape \(5,\).*\(6,\)"),
        ((X, WEIGHT, BIAS[None], 3), ValueError, r"bias has shape \(1, 6\).*\(6,\)"),
        ((X[0, 0, 0], WEIGHT, BIAS, 3), ValueError, r"x has shape \(4,\).*\(B, C, \.\.\.\)"),
        ((X, WEIGHT.to("meta"), BIAS, 3), ValueError, "on one device.*weight on meta"),
        ((X, WEIGHT, BIAS.long(), 3), TypeError, r"bias .*torch\.int64"),
        ((X.long(), WEIGHT, BIAS, 3), TypeError, r"x .*torch\.int64"),
    ],
)
def test_refused(arguments: Any, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        group_norm(*arguments)
