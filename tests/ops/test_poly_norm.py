"""PolyNorm beyond the cases: powers that overflow, the incumbent's helpers, errors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from liger_kernel import ops
from liger_kernel.backends import use_implementation
from liger_kernel.ops.poly_norm import poly_norm, reference
from liger_kernel.testing import Make, assert_no_worse
from liger_kernel.testing.calls import call, leaves, named
from liger_kernel.transformers import LigerPolyNorm

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
MAKE = Make(torch.bfloat16, DEVICE)
X, DY, WEIGHT, BIAS = (MAKE.randn(*n) for n in ((2, 3, 20), (2, 3, 20), (3,), (1,)))


def plain(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """The formula, word by word."""
    y = bias
    for factor, power in zip(weight, (3, 2, 1), strict=True):
        u = x**power
        y = y + factor * u * torch.rsqrt(u.square().mean(-1, keepdim=True) + eps)
    return y


@pytest.mark.parametrize("implementation", ["reference", "triton"])
@pytest.mark.parametrize("scale", [1e-2, 1.0, 1e10])
@pytest.mark.parametrize("columns", [64, 16384 + 40])
def test_the_formula(implementation: str, scale: float, columns: int) -> None:
    """In float32, x^6 is infinite for x beyond 2.6e6; n(x^3) and its gradient are not."""
    make, options = Make(torch.float32, DEVICE), {"eps": 1e-6}
    inputs = make.randn(3, columns, scale=scale), make.randn(3), make.randn(1)
    grads = {0: make.randn(3, columns)}
    high = named(*call(plain, options, leaves(inputs, {0, 1, 2}, torch.float64), grads))
    low = named(*call(reference.poly_norm, options, leaves(inputs, {0, 1, 2}), grads))
    with use_implementation(implementation):
        ours = named(*call(poly_norm, options, leaves(inputs, {0, 1, 2}), grads))
    for name in ours:
        assert_no_worse(name, ours[name], high[name], low[name])


def test_helpers() -> None:
    with use_implementation("triton"):
        tensors = [t.clone().requires_grad_() for t in (X, WEIGHT, BIAS[0])]
        y = poly_norm(*tensors, 1e-5)
        wanted = torch.autograd.grad(y, tensors, DY)
    made, rows, rstd, block, warps = ops.poly_norm_forward(X, WEIGHT, BIAS[0], 1e-5)
    assert torch.equal(made, y)
    assert (rows.shape, rstd.shape, rstd.dtype) == ((6, 20), (6, 3), torch.float32)
    found = ops.poly_norm_backward(DY, rows, WEIGHT, rstd, block, warps, True)
    assert all(map(torch.equal, found, wanted))


def test_module() -> None:
    ours = LigerPolyNorm()
    assert ours.weight.tolist() == torch.full((3,), 1 / 3).tolist()
    assert (ours.bias.shape, ours.bias.item()) == ((), 1.0)


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        ((X, WEIGHT[:2], BIAS), ValueError, r"weight has shape \(2,\).*\(3,\)"),
        ((X, WEIGHT[None], BIAS), ValueError, r"weight has shape \(1, 3\).*\(3,\)"),
        ((X, WEIGHT, WEIGHT), ValueError, r"bias has shape \(3,\).*one number"),
        ((X, WEIGHT.to("meta"), BIAS), ValueError, "on one device.*weight on meta"),
        ((X, WEIGHT, BIAS.long()), TypeError, r"bias .*torch\.int64"),
        ((X.long(), WEIGHT, BIAS), TypeError, r"x .*torch\.int64"),
        ((X[0, 0, 0], WEIGHT, BIAS), ValueError, r"x has shape \(\)"),
    ],
)
def test_refused(arguments: Any, error: type[Exception], match: str) -> None:
    for function in (poly_norm, ops.poly_norm_forward):
        with pytest.raises(error, match=match):
            function(*arguments)
