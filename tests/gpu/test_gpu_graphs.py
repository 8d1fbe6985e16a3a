"""`patch(model, cuda_graphs=True)` with graphs that are captured; tests/transformers has who is replayed."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import liger_kernel
from liger_kernel.backends import graphs, host_is_free
from tests.transformers.tiny import build

KEPT: list[Tensor] = []


@pytest.fixture(autouse=True)
def kernels_for_small_tensors() -> Iterator[None]:
    """A captured layer takes kernels for tensors of any size: to the bit, so must the one that is compared with it."""
    with host_is_free():
        yield


def pair(kind: str = "qwen3", **settings: Any) -> tuple[Any, Any]:
    model: Any = build(kind, torch.bfloat16, **settings).cuda().train()
    other = copy.deepcopy(model)
    liger_kernel.patch(model)
    liger_kernel.patch(other, cuda_graphs=True)
    return model, other


def step(model: Any, *lengths: int, autocast: bool = False) -> list[float]:
    """Gradients of all lengths are added up."""
    losses = []
    for length in lengths:
        generator = torch.Generator("cuda").manual_seed(length)
        ids = torch.randint(3, 131, (2, length), generator=generator, device="cuda")
        with torch.autocast("cuda", torch.bfloat16, enabled=autocast):
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        losses.append(loss.item())
        KEPT.append(
            loss
        )  # and with it where the gradients of all weights arrive, on the usual stream
    return losses


def same(model: Any, other: Any) -> None:
    for (name, p), q in zip(model.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad), name


def replays(model: Any) -> bool:
    rows = liger_kernel.patch(model, cuda_graphs=True).rows
    reasons = {row.reason for row in rows if row.kind == "graphs"}
    assert reasons == {""}
    return all(
        state.forms
        for layer in model.model.layers
        for state in layer.__dict__["_liger_graphs_of"].states[-1:]
    )


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_steps_to_the_bit(attention: str) -> None:
    """Lengths in turns, gradients that are added up, an optimizer that changes the weights in place."""
    model, other = pair(attn_implementation=attention)
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.01) for m in (model, other)]
    for _ in range(4):
        assert step(model, 64, 33, 64) == step(other, 64, 33, 64)
        same(model, other)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    assert replays(other)


def test_dropout_draws_what_it_would() -> None:
    model, other = pair("llama", attention_dropout=0.5)
    found: list[list[float]] = []
    for m in (model, other):
        torch.cuda.manual_seed(5)
        found.append([x for _ in range(3) for x in step(m, 64, 64)])
    assert found[0] == found[1]
    assert len(set(found[0])) == 6
    same(model, other)
    assert replays(other)


def test_autocast_and_evaluation() -> None:
    model, other = (m.float() for m in pair())
    ids = torch.arange(3, 35, device="cuda")[None]
    for _ in range(3):
        assert step(model, 64, autocast=True) == step(other, 64, autocast=True)
        found: list[Tensor] = []
        for m in (model, other):
            with torch.no_grad():
                found.append(m.eval()(input_ids=ids, use_cache=False).logits)
            m.train()
        assert torch.equal(*found)
    same(model, other)
    assert replays(other)


class Counts(torch.nn.Module):
    """As a BatchNorm keeps statistics."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros((), device="cuda"))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return torch.tanh(x)


def test_buffers_and_code_that_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    """A replay counts once, as a call does; what was captured is not played back when its code is another."""
    models = pair()
    for m in models:
        m.model.layers[0].mlp.act_fn = Counts()
    for number in range(1, 5):
        assert step(models[0], 64) == step(models[1], 64)
        counts = [m.model.layers[0].mlp.act_fn.calls.item() for m in models]
        assert counts == [number, number]
    assert replays(models[1])
    cls = type(models[0].model.layers[0].mlp)
    forward = cls.forward
    monkeypatch.setattr(cls, "forward", lambda self, x: 2 * forward(self, x))
    for _ in range(3):
        assert step(models[0], 64) == step(models[1], 64)
    same(*models)


def test_memory_is_given_back() -> None:
    _, other = pair()
    step(other, 64)
    other.zero_grad()
    KEPT.clear()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_reserved()
    step(other, 64, 64)
    assert replays(other)
    liger_kernel.unpatch(other)
    other.zero_grad()
    KEPT.clear()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    assert torch.cuda.memory_reserved() <= before + 2**26  # a workspace of cuBLAS for each thread


class Waits(torch.nn.Module):
    """Whose code asks for a number, which nobody can have in a capture. No kernel of ours takes the place of a tanh."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x) * (1.0 if x.sum().item() < 1e30 else 2.0)


def test_a_capture_that_breaks_off(monkeypatch: pytest.MonkeyPatch) -> None:
    """The layers run as before, and so does everything else on the device."""
    monkeypatch.setattr(graphs, "failed", None)
    model: Any = build("qwen3", torch.bfloat16).cuda().train()
    model.model.layers[1].mlp.act_fn = Waits()
    other = copy.deepcopy(model)
    liger_kernel.patch(model)
    report = liger_kernel.patch(other, cuda_graphs=True)
    for _ in range(3):
        assert step(model, 64) == step(other, 64)
    same(model, other)
    # of this report: another call would try the MLP that was left alone, and the layers with it, anew
    reasons = [row.reason for row in report.rows if row.kind == "graphs"]
    assert [reason for reason in reasons if "cannot be captured" in reason], reasons
    torch.cuda.manual_seed(1)
    a = torch.rand(8, device="cuda")
    torch.cuda.manual_seed(1)
    assert torch.equal(a, torch.rand(8, device="cuda"))
    monkeypatch.setattr(graphs, "failed", None)
    test_dropout_draws_what_it_would()
