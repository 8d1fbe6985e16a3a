"""What `patch` installs is proven; an error in a proof is told apart: theirs is reported, ours is raised."""

from __future__ import annotations

import functools
import inspect
import logging
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import liger_kernel
from liger_kernel._core.tolerance import excess
from liger_kernel.transformers import patching
from liger_kernel.transformers.patching import facts, plans, proof, streams, sums
from liger_kernel.transformers.patching.options import Option
from liger_kernel.transformers.patching.site import Site, modules
from liger_kernel.transformers.patching.sites import (
    experts,
    mlps,
    norms,
    relu_squared,
    residual,
    rope,
)
from liger_kernel.transformers.patching.sites import streams as of_streams
from tests.transformers.steps import assert_identical, snapshot
from tests.transformers.test_hyper_connections import Layer
from tests.transformers.tiny import Experts, build

SIZE = 48


@pytest.fixture
def nothing_proven() -> None:
    """Verdicts are kept for the process."""
    for site in (experts, mlps, norms, relu_squared, residual, of_streams):
        site.find_plan.cache_clear()
    for function in (rope.prove, rope._rebound):
        function.cache_clear()


def rows(model: nn.Module, **options: Any) -> dict[str, str]:
    """By path, what replaces it or why nothing does, but for the loss."""
    report = liger_kernel.patch(model, **options)
    return {row.path: row.by or row.reason for row in report.rows if row.kind != "loss"}


# -- errors ------------------------------------------------------------------------------------------------------------


class Squared(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x).square()


@pytest.mark.parametrize(
    ("op", "name", "build_one"),
    [
        (norms.rms_norm_op, "rms_norm", lambda: build("llama")),
        (norms.layer_norm_op, "layer_norm", lambda: nn.Sequential(nn.LayerNorm(SIZE))),
        (mlps.gated_mlp_op, "gated_mlp", lambda: build("llama", mlp_bias=False)),
        (mlps.glu_op, "gated_product", lambda: build("llama")),  # with biases
        (experts.moe_op, "fused_moe", lambda: nn.Sequential(Experts())),
        (
            relu_squared.relu_squared_op,
            "relu_squared",
            lambda: nn.Sequential(nn.ModuleDict({"act": Squared()})),
        ),
        (rope.rope_op, "rope", lambda: build("llama")),
        (rope.qk_norm_rope_op, "qk_norm_rope", lambda: build("qwen3")),
        (sums.fused_op, "fused_add_rms_norm", lambda: build("llama")),
        (streams, "mhc_mix", lambda: nn.Sequential(Layer())),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
@pytest.mark.parametrize("error", [RuntimeError, ValueError, TypeError])
def test_an_error_of_ours_is_raised(
    op: Any,
    name: str,
    build_one: Any,
    error: type[Exception],
    monkeypatch: pytest.MonkeyPatch,
    nothing_proven: None,
) -> None:
    model = build_one()
    before = snapshot(model)

    def broken(*args: Any, **kwargs: Any) -> Any:
        raise error("planted")

    with monkeypatch.context() as planted:
        planted.setattr(op, name, broken)
        with pytest.raises(error, match="planted"):
            liger_kernel.patch(model)
    assert_identical(before, snapshot(model))
    assert not liger_kernel.patch(model, fused_linear_cross_entropy=False).skipped  # nothing stuck


class BrokenNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(SIZE)), 1e-6

    def forward(self, x: Tensor) -> Tensor:
        raise OSError("no kernel for this\nand more")


class BrokenMLP(nn.Module):
    def __init__(self, inner: int = 80) -> None:
        super().__init__()
        self.act_fn = nn.SiLU()
        self.gate, self.up = nn.Linear(SIZE, inner), nn.Linear(SIZE, inner)
        self.down = nn.Linear(inner, SIZE)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.act_fn(self.gate(x)) * self.up(x) + self.missing)


class BrokenExperts(Experts):
    def _apply_gate(self, gate_up: Tensor) -> Tensor:
        raise OSError("no gate")


def rotate(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    raise OSError("no angles")


class Attention(nn.Module):
    def forward(self, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        return rotate(q, k, cos, sin)


def test_an_error_of_theirs_is_reported() -> None:
    found = rows(nn.Sequential(BrokenNorm(), BrokenMLP(), BrokenExperts(), Attention()))
    assert found == {
        "0": "BrokenNorm cannot be run alone: OSError: no kernel for this",
        "1": "BrokenMLP cannot be run alone: AttributeError: 'BrokenMLP' object has no attribute 'missing'",
        "2": "BrokenExperts cannot be run alone: OSError: no gate",
        "3": "its rotary function cannot be run alone: OSError: no angles",
    }


class HeadsNorm(nn.Module):
    """A weight that is no row, which our op would refuse."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(4, SIZE)), 1e-6

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps) * self.weight[0]


class SquareMLP(nn.Module):
    """All Linears have one size: every one may be the last."""

    def __init__(self) -> None:
        super().__init__()
        self.act_fn = nn.SiLU()
        self.a, self.b, self.c = (nn.Linear(SIZE, SIZE) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.act_fn(self.c(x)) * self.a(x))


class Wider(SquareMLP):
    """Gate and up read different things: no candidate fits."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(SIZE + 1, SIZE)


def test_candidates_fit_before_they_run() -> None:
    assert rows(nn.Sequential(HeadsNorm(), SquareMLP(), Wider())) == {
        "0": "HeadsNorm computes something else",
        "1": "LigerSwiGLU",
        "2": "Wider computes something else",
    }


# -- numbers -----------------------------------------------------------------------------------------------------------


def test_the_rule() -> None:
    eps = torch.finfo(torch.float32).eps
    high = torch.tensor([1.0, -4.0], dtype=torch.float64)
    low = high * (1 + eps)
    assert excess(high, high, low, eps=eps) < 1
    assert excess(high * (1 + 3.9 * eps), high, low, eps=eps) < 1
    assert excess(high * (1 + 4.1 * eps), high, low, eps=eps) > 1
    assert excess(high * (1 + 2.1 * eps), high, low, eps=eps, factor=1) > 1
    assert excess(high + torch.tensor([0, 15.9 * eps]), high, low, eps=eps) < 1  # the largest error
    assert excess(high + 15.9 * eps, high, low, eps=eps) > 1  # the root mean square
    assert not excess(high * torch.nan, high, low, eps=eps) <= 1
    assert excess(high[:0], high[:0], low[:0], eps=eps) <= 1


def test_the_luck_of_a_draw_is_no_verdict() -> None:
    """Two orders of one sum: in one draw of a number either may be exact, and which one differs between processors."""
    for seed in range(8):
        x = torch.randn(1, 100, generator=torch.Generator().manual_seed(seed))
        x = torch.cat([x, 0.01 - x.sum(-1, keepdim=True)], -1)
        theirs = proof.Theirs(lambda _, x: sum(x.unbind(-1)), nn.Module(), [x])
        assert theirs.agrees(lambda _, x: sum(x.unbind(-1)[::-1]))
        assert not theirs.agrees(lambda _, x: sum(x.unbind(-1)).bfloat16().to(x.dtype))


class InFloat32(BrokenMLP):
    """Whatever it is given: its own run in float64 would mix dtypes."""

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate(x).float(), self.up(x).to(torch.float32)
        return self.down(F.silu(gate) * up)


def test_float64_for_what_computes_in_float32() -> None:
    assert rows(nn.Sequential(InFloat32())) == {"0": "LigerSwiGLU"}


class Off(BrokenMLP):
    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.act_fn(self.gate(x)) * self.up(x)) * (1 + 2e-6)


def test_some_spacings_are_a_difference() -> None:
    assert rows(nn.Sequential(Off())) == {"0": "Off computes something else"}


class WithDropout(BrokenMLP):
    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.dropout(self.act_fn(self.gate(x)) * self.up(x), 0.5, self.training))


def test_no_random_state_is_touched() -> None:
    model = nn.Sequential(WithDropout())
    state = torch.get_rng_state()
    assert rows(model) == {"0": "WithDropout computes something else"}
    assert torch.equal(torch.get_rng_state(), state)


# -- sites -------------------------------------------------------------------------------------------------------------


def test_the_options_come_from_the_sites() -> None:
    names = [option.name for option in patching.OPTIONS]
    assert len({*names}) == len(names)
    # what users call by name; a site may bring more
    known = "fused_linear_cross_entropy cross_entropy rms_norm layer_norm residual mlp rope lora"
    assert {*known.split(), "hyper_connections", "short_conv"} <= {*names}
    text = inspect.getdoc(liger_kernel.patch) or ""
    for option in patching.OPTIONS:
        assert f"\n    {option.name}: {option.help} Default: {option.default}.\n" in text


class Doubled(plans.MethodPlan):
    kind = "double"

    def __str__(self) -> str:
        return "LigerDouble"

    def compute(self, module: nn.Module, x: Tensor) -> Tensor:
        return x + x


class Double(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * x


@proof.verdict
def find_plan(module: nn.Module) -> Doubled | None:
    theirs = proof.Theirs(type(module).forward, proof.clone(module, {}, {}), [torch.randn(3, 5)])
    return Doubled() if theirs.agrees(Doubled().compute) else None


DOUBLE = Option("double", True, "what doubles.")
TOY = Site(
    options=(DOUBLE,),
    kind=Doubled.kind,
    candidates=modules(lambda module: "double" in type(module).__name__.lower()),
    prove=lambda module, state: find_plan(module),
)


def test_a_site_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """All that a new kind of replacement needs is above; the rest of this is the line in `SITES`."""
    monkeypatch.setattr(patching, "SITES", (*patching.SITES, TOY))
    monkeypatch.setattr(patching, "OPTIONS", (*patching.OPTIONS, DOUBLE))
    model = nn.Sequential(Double(), type("NotDouble", (Squared,), {})())
    assert rows(model) == {"0": "LigerDouble", "1": "NotDouble computes something else"}
    assert repr(model[0]) == "LigerDouble[Double]()"
    assert rows(model, double=False) == {}
    model[0].forward = lambda x: x
    assert rows(model)["0"] == "its forward was already replaced"


def test_classes_and_logs_never_change_in_place() -> None:
    """The checkpoints of transformers 5.24 name both; compared by their insides they took a tenth of a layer's time."""
    assert all(map(facts._is_fixed, (functools.partial, logging.getLogger("any"))))
    assert not facts._is_fixed(functools.partial(F.gelu, approximate="tanh"))
