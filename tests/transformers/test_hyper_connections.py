"""Hyper-connections in the models of transformers: what is proven, what is not, and when HF's own code runs."""

from __future__ import annotations

import collections
import copy
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import liger_kernel
from liger_kernel.testing import Make, assert_draws_no_worse, assert_no_worse
from tests.transformers.here import hf_class
from tests.transformers.steps import in_float64

Calls = collections.Counter[str]
STREAMS, COLUMNS = 4, 12
CONFIG = SimpleNamespace(
    hc_mult=STREAMS,
    hc_sinkhorn_iters=20,
    hc_eps=1e-6,
    hc_magnitude=2.0,
    rms_norm_eps=1e-5,
    hidden_size=COLUMNS,
)
MHC = "deepseek_v4.DeepseekV4HyperConnection"
FOUND = {
    MHC: "LigerHyperConnection(4 streams, 20 Sinkhorn steps)",
    "glm5_next.Glm5NextTextHyperConnection": "LigerHyperConnection(4 streams, 20 Sinkhorn steps)",
    "hy_v4.HYV4HyperConnection": "LigerHyperConnection(4 streams)",
    "hy_v4_vl.HYV4VLHyperConnection": "LigerHyperConnection(4 streams)",
    "deepseek_v4.DeepseekV4HyperHead": "LigerHyperConnection(4 streams)",
    "hy_v4.HYV4HyperHead": "LigerHyperConnection(4 streams)",
}


def made(where: str, cls: Any = None, **config: Any) -> nn.Module:
    module = (cls or hf_class(where))(SimpleNamespace(**{**vars(CONFIG), **config}))
    make = Make(torch.float32)
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(make.randn(*p.shape, scale=0.5) + (p.numel() <= 3))
    return module  # type: ignore[no-any-return]


def patched(module: nn.Module, **options: Any) -> tuple[Any, dict[str, str]]:
    """A copy of the module inside of a patched model, and what the report says."""
    model = nn.Sequential(copy.deepcopy(module))
    rows = liger_kernel.patch(model, **options).rows
    return model[0], {row.path: row.by or row.reason for row in rows if row.kind != "loss"}


def run(module: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Outputs and all gradients under fixed cotangents."""
    x = x.clone().requires_grad_()
    found = module(x)
    found = found if isinstance(found, tuple) else (found,)
    outputs = {f"output {i}": o.detach() for i, o in enumerate(found)}
    make = Make(torch.float64, seed=1)
    cotangents = [make.randn(*o.shape).to(o.dtype) for o in found]
    wanted = {"x": x, **dict(module.named_parameters())}
    return outputs | dict(
        zip(wanted, torch.autograd.grad(found, [*wanted.values()], cotangents), strict=True)
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("where", FOUND)
def test_same_numbers(where: str, dtype: torch.dtype, calls: Calls) -> None:
    module = made(where)
    ours, rows = patched(module)
    assert rows["0"] == FOUND[where]
    assert "LigerHyperConnection[" in str(ours)

    def draw(seed: int) -> Any:
        x = Make(torch.float32, seed=2 + seed).randn(2, 5, STREAMS, COLUMNS).to(dtype)
        low = run(module, x)
        high = in_float64(lambda: run(copy.deepcopy(module).double(), x.double()))
        calls.clear()
        found = run(ours, x)
        assert calls["mhc_project"] == calls["mhc_mix"] == 1
        assert calls["mhc_sinkhorn"] == ("Sinkhorn" in FOUND[where])
        assert {n: t.dtype for n, t in found.items()} == {n: t.dtype for n, t in low.items()}
        return found, {name: high[name].double() for name in low}, low

    assert_draws_no_worse(draw)


def varied(**attributes: Any) -> type[nn.Module]:
    """DeepSeek's module whose forward computes with other numbers than it has."""
    parent = hf_class(MHC)

    def forward(self: Any, hidden_streams: Tensor) -> Any:
        own = {name: getattr(self, name) for name in attributes}
        for name, value in attributes.items():
            setattr(self, name, value(own[name]))
        try:
            return parent.forward(self, hidden_streams)
        finally:
            for name, value in own.items():
                setattr(self, name, value)

    return type("Varied", (parent,), {"forward": forward})


def test_another_function_is_left_alone() -> None:
    parent = hf_class(MHC)

    class OtherOrder(parent):  # type: ignore[misc, valid-type]
        def forward(self, hidden_streams: Tensor) -> Any:
            post, comb, collapsed = super().forward(hidden_streams)
            return post, comb.transpose(-1, -2), collapsed

    class Rounds(parent):  # type: ignore[misc, valid-type]
        def forward(self, hidden_streams: Tensor) -> Any:
            post, *rest = super().forward(hidden_streams)
            return post.to(hidden_streams.dtype), *rest

    for cls in (
        OtherOrder,
        Rounds,
        varied(hc_sinkhorn_iters=lambda n: n + 1),
        varied(hc_eps=lambda eps: 2 * eps),
    ):
        rows = patched(made("", cls))[1]
        assert rows["0"] == f"{cls.__name__} computes something else", cls


def test_a_changed_module_and_other_calls_are_hfs(calls: Calls) -> None:
    module = made(MHC)
    ours, _ = patched(module)
    x = torch.randn(2, 3, STREAMS, COLUMNS)
    calls.clear()
    ours(x)
    assert calls["mhc_project"] == 1  # although the norm inside has a forward of ours, too
    assert all(map(torch.equal, ours(hidden_streams=x), module(x)))
    for other in (ours, module):
        other.hc_sinkhorn_iters = 2
    assert all(map(torch.equal, ours(x), module(x)))
    ours.hc_sinkhorn_iters = 20
    seen: list[Any] = []
    ours.input_norm.register_forward_hook(lambda *given: seen.append(given))
    ours(x)
    assert seen
    assert calls["mhc_project"] == 1


def test_switched_off(calls: Calls) -> None:
    module = made(MHC)
    ours, rows = patched(module, hyper_connections=False)
    assert "0" not in rows
    calls.clear()
    ours(torch.randn(1, 2, STREAMS, COLUMNS))
    assert not calls["mhc_project"]
    assert calls["rms_norm"] == 1


# -- layers ------------------------------------------------------------------------------------------------------------


class Layer(nn.Module):
    """DeepSeek's sums behind one layer; `scale`: of what that gives to the streams."""

    def __init__(self, scale: float | None = None, before: bool = False):
        super().__init__()
        self.hc, self.inner = made(MHC), nn.Linear(COLUMNS, COLUMNS)
        self.scale, self.before = scale, before

    def forward(self, x: Tensor) -> Tensor:
        post, comb, collapsed = self.hc(x)
        weights = post.to(x.dtype).unsqueeze(-1)
        if self.scale is not None:
            weights = weights * self.scale
        given = weights * self.inner(collapsed).unsqueeze(-2)
        mixed = torch.matmul(comb.to(x.dtype).transpose(-1, -2), x)
        return mixed + given if self.before else given + mixed


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("before", [False, True])
def test_streams_are_mixed_by_one_op(before: bool, dtype: torch.dtype, calls: Calls) -> None:
    torch.manual_seed(0)
    theirs = Layer(before=before)
    ours, rows = patched(theirs)
    assert rows["0"] == "streams mixed behind hc"
    ours, theirs = ours.to(dtype), theirs.to(dtype)
    x = Make(torch.float32, seed=2).randn(2, 5, STREAMS, COLUMNS).to(dtype)
    low = run(theirs, x)
    high = in_float64(lambda: run(copy.deepcopy(theirs).double(), x.double()))
    calls.clear()
    found = run(ours, x)
    assert calls["mhc_mix"] == 2
    for name, of_theirs in low.items():
        assert_no_worse(name, found[name], high[name].double(), of_theirs)
    with torch.autocast("cpu", torch.bfloat16):
        assert ours(x).dtype == theirs(x).dtype


def test_sums_of_another_form_are_the_layers_own(calls: Calls) -> None:
    theirs = Layer(scale=3.0)
    ours, rows = patched(theirs)
    assert "0" not in rows
    x = torch.randn(2, 5, STREAMS, COLUMNS)
    calls.clear()
    high, low = copy.deepcopy(theirs).double()(x.double()), theirs(x)
    assert_no_worse("y", ours(x), high, low)
    assert calls["mhc_mix"] == 1


def test_who_sees_coefficients_gets_tensors(calls: Calls) -> None:
    theirs = Layer()
    ours, _ = patched(theirs)
    seen: list[Any] = []
    hook = ours.hc.register_forward_hook(lambda module, args, found: seen.extend(found))
    x = torch.randn(2, 5, STREAMS, COLUMNS)
    calls.clear()
    ours(x)
    assert [type(t) for t in seen] == [Tensor] * 3
    assert calls["mhc_mix"] == 1
    hook.remove()
    ours(x)
    assert calls["mhc_mix"] == 3
    assert type(ours.hc(x)[0]) is Tensor  # outside of its layer
    assert torch.equal(copy.deepcopy(ours)(x), ours(x))
