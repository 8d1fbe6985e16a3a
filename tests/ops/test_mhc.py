"""Hyper-connections: the incumbent's helpers, the module, and what is refused."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from liger_kernel.backends import use_implementation
from liger_kernel.compat.ops import mhc
from liger_kernel.functional import (
    mhc_coeffs,
    mhc_mix,
    mhc_post_res,
    mhc_pre,
    mhc_project,
    mhc_sinkhorn,
)
from liger_kernel.testing import Make, assert_no_worse
from liger_kernel.transformers import LigerMHC
from liger_kernel.transformers import functional as F

MAKE = Make(torch.float32)
X = MAKE.randn(5, 4, 6)
PHI, B = MAKE.randn(24, 24, scale=0.2), MAKE.randn(24)
ALPHAS = tuple(MAKE.randn(1)[0] for _ in range(3))
OPTIONS: dict[str, Any] = {"tmax": 4, "sinkhorn_eps": 1e-6}


def gradients(outputs: Any, wanted: list[Tensor], grads: Any) -> tuple[Tensor, ...]:
    return torch.autograd.grad(outputs, wanted, grads)


def leaves(*tensors: Tensor, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return [t.detach().to(dtype).requires_grad_() for t in tensors]


def assert_like_autograd(
    function: Any, found: tuple[Tensor, ...], grad: Tensor, *given: Tensor
) -> None:
    """`found` are the gradients of `function`."""
    runs = []
    for dtype in (torch.float64, torch.float32):
        inputs = leaves(*given, dtype=dtype)
        with use_implementation("reference"):
            runs.append(gradients(function(*inputs), inputs, grad.to(dtype)))
    for ours, high, low in zip(found, *runs, strict=True):
        assert_no_worse("gradient", ours, high, low)


@pytest.mark.parametrize(
    ("weight", "splits"), [(torch.float32, True), (torch.bfloat16, True), (torch.float16, False)]
)
def test_three_parts_are_bf16(
    weight: torch.dtype, splits: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Outside of the interpreter: a unit for matrices does not multiply bf16 by fp16."""
    kernels = pytest.importorskip("liger_kernel.ops.mhc_project.triton")
    launched = []
    monkeypatch.setattr(kernels, "INTERPRET", False)
    monkeypatch.setattr(kernels, "launch", lambda *args, **options: launched.append(options))
    x, w = MAKE.randn(5, 16).bfloat16(), MAKE.randn(16, 8).to(weight)
    saved = x, w, MAKE.randn(5, 8), MAKE.randn(5)
    kernels.backward((saved[2],), saved, options=None, needs=(True, False))
    assert [options["SPLIT"] for options in launched] == [splits]


@pytest.mark.usefixtures("on_the_kernels_device")
@pytest.mark.parametrize("implementation", ["reference", "triton"])
def test_helpers(implementation: str) -> None:
    make, alphas = Make(torch.float32), [t.to(torch.get_default_device()) for t in ALPHAS]
    x, phi, b = make.randn(5, 4, 6), make.randn(24, 24, scale=0.2), make.randn(24)
    with use_implementation(implementation):
        rows, g = x.flatten(1), make.randn(5, 24)
        mix, invr = mhc.mhc_mm_norm_fwd(rows, phi, 1e-6)
        assert mix.shape == (5, 24)
        high, low = (r.square().mean(-1).add(1e-6).rsqrt() for r in (rows.double(), rows))
        assert_no_worse("invr", invr, high, low)
        found = mhc.mhc_mm_norm_bwd(rows, phi, mix, invr, g)
        assert_like_autograd(mhc_project, found, g, rows, phi)
        outs = [torch.empty(5, 4), torch.empty(5, 4), torch.empty(5, 4, 4)]
        names = ("out_hpre", "out_hpost", "out_hres")
        *coeffs, hist = mhc.mhc_split_sinkhorn_fwd(
            *(mix, b, *alphas),
            **OPTIONS,
            pre_eps=0.0,
            post_mult=2.0,
            return_hist=True,
            **dict(zip(names, outs, strict=True)),
        )
        assert all(a is b for a, b in zip(coeffs, outs, strict=True))
        expected = mhc_coeffs(x, phi, b, *alphas, **OPTIONS)
        assert all(map(torch.equal, coeffs, expected))
        assert hist.shape == (5, 4, 4, 4)
        assert torch.equal(hist[:, -1], coeffs[2])

        g = make.randn(5, 4, 4)
        logits = (mix[:, 8:] * alphas[2] + b[8:]).view(5, 4, 4)
        zero, one = torch.zeros(24), torch.ones(())

        def of_logits(z: Tensor) -> Tensor:
            whole = torch.cat((z.new_zeros(5, 8), z.flatten(1)), -1)
            more = (t.to(z.dtype) for t in (zero, one, one, one))
            return mhc_sinkhorn(whole, *more, **OPTIONS)[2]

        found = (mhc.mhc_sinkhorn_bwd(mix, b, alphas[2], g, **OPTIONS, hist=hist),)
        assert_like_autograd(of_logits, found, g, logits)

        h_pre, h_post, h_res = coeffs
        f, g = make.randn(5, 6), make.randn(5, 6)
        assert torch.equal(mhc.mhc_pre_fwd(x, h_pre), mhc_pre(x, h_pre))
        assert mhc.mhc_pre_fwd(x.bfloat16(), h_pre).dtype == torch.float32
        assert_like_autograd(mhc_pre, mhc.mhc_pre_bwd(x, h_pre, g), g, x, h_pre)
        g, out = make.randn(5, 4, 6), torch.empty(5, 4, 6)
        given = (x, f, h_post, h_res)
        assert mhc.mhc_post_res_fwd(*given, out=out) is out
        assert torch.equal(out, mhc_post_res(*given))
        assert_like_autograd(mhc_post_res, mhc.mhc_post_res_bwd(*given, g), g, *given)


def test_h_res_is_doubly_stochastic() -> None:
    h_res = mhc_sinkhorn(MAKE.randn(7, 24, scale=2), B, *ALPHAS, tmax=60)[2].double()
    for dim in (-1, -2):
        assert (h_res.sum(dim) - 1).abs().max() < 1e-4


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_module(dtype: torch.dtype) -> None:
    layer = nn.Linear(6, 6).to(dtype)
    module = LigerMHC(layer, hc=4, c=6, tmax=3, phi_dtype=dtype)
    assert "hc=4, c=6, tmax=3" in repr(module)
    assert {n: p.dtype for n, p in module.named_parameters() if "layer" not in n} == {
        "phi": dtype,
        **dict.fromkeys(("b", "alpha_pre", "alpha_post", "alpha_res"), torch.float32),
    }
    x = X.to(dtype)
    y = module(x)
    assert (y.shape, y.dtype) == (x.shape, dtype)
    y.sum().backward()
    assert all(p.grad is not None for p in module.parameters())
    parameters = (module.phi, module.b, module.alpha_pre, module.alpha_post, module.alpha_res)
    again, coeffs = F.liger_mhc_forward(x, layer, *parameters, tmax=3, return_coeffs=True)
    assert torch.equal(again, y)
    assert all(map(torch.equal, coeffs, F.liger_mhc_coeffs(x, *parameters, tmax=3)))
    f_out = layer(F.liger_mhc_pre(x, coeffs[0]))
    applied, x_in = F.liger_mhc_apply(x, f_out, *coeffs, return_x_in=True)
    assert torch.equal(applied, y)
    assert torch.equal(layer(x_in), f_out)
    assert torch.equal(copy.deepcopy(module)(x), y)
    assert F.liger_mhc_forward(x, torch.tanh, *parameters).shape == x.shape  # any callable


def test_streams_and_layer_may_differ_in_dtype() -> None:
    module = LigerMHC(nn.Linear(6, 6).bfloat16(), hc=4, c=6)
    assert module(X).dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        assert all(h.dtype == torch.float32 for h in mhc_coeffs(X, PHI, B, *ALPHAS))


def test_compiles_to_one_graph() -> None:
    module = LigerMHC(nn.Linear(6, 6), hc=4, c=6, tmax=2, phi_dtype=torch.float32)
    torch._dynamo.reset()
    compiled = torch.compile(module, fullgraph=True, backend="eager")
    assert torch.equal(compiled(X), module(X))


def test_what_is_refused() -> None:
    module = LigerMHC(nn.Linear(6, 6), hc=4, c=6)
    with pytest.raises(ValueError, match=r"Expected x.shape\[-2:\]=\[4, 6\], got \[6, 4\]"):
        module(X.transpose(1, 2))
    with pytest.raises(ValueError, match=r"x \(5, 24\) and weight \(23, 24\) do not fit"):
        mhc_project(X.flatten(1), PHI[1:])
    with pytest.raises(ValueError, match=r"mix \(5, 23\) and b \(24,\) do not fit"):
        mhc_sinkhorn(X.flatten(1)[:, 1:], B, *ALPHAS)
    with pytest.raises(ValueError, match=r"tmax=0 must be at least 1"):
        mhc_sinkhorn(X.flatten(1), B, *ALPHAS, tmax=0)
    with pytest.raises(ValueError, match=r"alpha_post has shape \(24,\), but it is one number"):
        mhc_sinkhorn(X.flatten(1), B, ALPHAS[0], B, ALPHAS[2])
    h = MAKE.randn(5, 4, 4)
    for wrong in ((X, h[:4]), (X, h[..., :3]), (X, h, X[:, 0]), (X, h, X[:, 0], h[:, 0, :3])):
        with pytest.raises(ValueError, match=r"do not fit each other; pass \(..., I, C\)"):
            mhc_mix(*wrong)
    with pytest.raises(TypeError, match=r"weights must have a floating dtype, got torch.int64"):
        mhc_mix(X, h.long())
