"""Dynamic tanh beyond the cases: NaN, alpha's shape and dtype, the incumbent's helpers, errors."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from liger_kernel import ops
from liger_kernel.backends import use_implementation
from liger_kernel.ops.dyt import dyt, reference
from liger_kernel.testing import Make, assert_no_worse
from liger_kernel.transformers import LigerDyT

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
MAKE = Make(torch.bfloat16, DEVICE)
X, DY, ALPHA, GAMMA, BETA = (MAKE.randn(*n) for n in ((2, 3, 20), (2, 3, 20), (1,), (20,), (20,)))


@pytest.fixture(params=["reference", "triton"])
def implementation(request: pytest.FixtureRequest) -> Iterator[None]:
    with use_implementation(request.param):
        yield


@pytest.mark.usefixtures("implementation")
def test_parameters_in_fp32_of_16_bits() -> None:
    """tanh is as exact as their gradients: here its error is largest, and of one sign."""
    x = (2 + MAKE.randn(512, 48, scale=0.05)) * MAKE.randn(512, 48).sign()
    dy, alpha = x.sign(), torch.full((1,), 0.031, device=DEVICE)
    gamma = Make(torch.float32, DEVICE).randn(48)

    def gradients(function: Any, dtype: torch.dtype | None = None) -> Any:
        inputs = [t.to(dtype or t.dtype).requires_grad_() for t in (x, alpha, gamma)]
        y = function(*inputs, None)
        return torch.autograd.grad(y, inputs[1:], dy.to(y.dtype))

    runs = gradients(dyt), gradients(reference.dyt, torch.float64), gradients(reference.dyt)
    for name, found, exact, eager in zip(("alpha", "gamma"), *runs, strict=True):
        assert_no_worse(name, found, exact, eager)


@pytest.mark.usefixtures("implementation")
def test_limits() -> None:
    """tanh is 1 far out, with a slope of 0, and NaN stays so."""
    x = torch.tensor([[float("nan"), -1e30, float("inf"), 0.0]], device=DEVICE, requires_grad=True)
    one = torch.ones(1, device=DEVICE)
    y = dyt(x, one, one.expand(4), one.expand(4))
    y.sum().backward()
    assert y.isnan().tolist() == [[True, False, False, False]]
    assert y[0, 1:].tolist() == [0.0, 2.0, 1.0]
    assert x.grad[0, 1:].tolist() == [0.0, 0.0, 1.0]


@pytest.mark.usefixtures("implementation")
@pytest.mark.parametrize("shape", [(), (1,), (1, 1)], ids=str)
def test_gradients_are_like_the_parameters(shape: tuple[int, ...]) -> None:
    alpha, gamma, beta = (
        t.detach().requires_grad_() for t in (ALPHA.float().view(shape), GAMMA, BETA.half())
    )
    y = dyt(X, alpha, gamma, beta)
    assert (y.dtype, y.shape) == (X.dtype, X.shape)
    for parameter in (alpha, gamma, beta):
        (grad,) = torch.autograd.grad(y, parameter, DY, retain_graph=True)
        assert (grad.shape, grad.dtype) == (parameter.shape, parameter.dtype)


@pytest.mark.usefixtures("implementation")
@pytest.mark.parametrize("beta", [None, BETA], ids=["no-beta", "beta"])
def test_helpers(beta: Any) -> None:
    leaves = [None if t is None else t.clone().requires_grad_() for t in (X, ALPHA, GAMMA, beta)]
    y = dyt(*leaves)
    wanted = torch.autograd.grad(y, [t for t in leaves if t is not None], DY)
    made = ops.liger_dyt_fwd(*leaves)
    assert torch.equal(made, y)
    assert not made.requires_grad
    found = ops.liger_dyt_bwd(DY, X, ALPHA, GAMMA, beta)
    assert (found[3] is None) == (beta is None)
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=False))


def test_module() -> None:
    ours = LigerDyT(4, init_alpha=0.25)
    assert {name: p.tolist() for name, p in ours.named_parameters()} == {
        "alpha": [0.25],
        "gamma": [1.0] * 4,
        "beta": [0.0] * 4,
    }
    assert LigerDyT(4, beta=False).beta is None


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        (
            (X, torch.ones(2, device=DEVICE), GAMMA),
            ValueError,
            r"alpha has shape \(2,\).*one number",
        ),
        ((X, torch.ones(1, device="meta"), GAMMA), ValueError, "on one device.*alpha on meta"),
        ((X, ALPHA.long(), GAMMA), TypeError, r"alpha .*torch\.int64"),
        ((X, ALPHA, GAMMA[:7]), ValueError, r"gamma has shape \(7,\).*is 20"),
        ((X, ALPHA, GAMMA, BETA[:1]), ValueError, r"beta has shape \(1,\).*is 20"),
        ((X.long(), ALPHA, GAMMA), TypeError, r"x .*torch\.int64"),
    ],
)
def test_refused(arguments: Any, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        dyt(*arguments)
