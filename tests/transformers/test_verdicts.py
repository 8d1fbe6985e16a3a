"""A verdict is shared by modules that are provably equal, and by no others."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers.models.llama import modeling_llama

import liger_kernel
from liger_kernel.transformers.patching.sites import mlps, norms, relu_squared, residual
from tests.transformers.test_facts import MLP, SIZE, Swish, X, drawn, rows
from tests.transformers.tiny import build


def test_among_fake_tensors() -> None:
    """As memory estimators use them."""
    mlps.find_plan.cache_clear()
    norms.find_plan.cache_clear()
    with FakeTensorMode():
        assert rows(MLP(), modeling_llama.LlamaRMSNorm(SIZE)) == [
            "LigerSwiGLU",
            "LigerRMSNorm(llama)",
        ]


@pytest.mark.parametrize("betas", [(1.0, 4.0, 1.0), (4.0, 1.0, 4.0)])
def test_children_of_one_class(betas: tuple[float, ...]) -> None:
    expected = {1.0: "LigerSwiGLU", 4.0: None}
    assert rows(*(MLP(Swish(beta)) for beta in betas)) == [expected[beta] for beta in betas]


def test_partials() -> None:
    exact, tanh = (functools.partial(F.gelu, approximate=name) for name in ("none", "tanh"))
    assert rows(*(MLP(act) for act in (exact, tanh, exact))) == [
        "LigerGeGLU(erf)",
        "LigerGeGLU",
        "LigerGeGLU(erf)",
    ]


def test_equal_layers_are_proven_once(monkeypatch: pytest.MonkeyPatch) -> None:
    for site in (mlps, norms, relu_squared, residual):
        site.find_plan.cache_clear()
    proven = []
    original = mlps.proof.proven

    def spied(find: Any, module: nn.Module, parts: Any) -> Any:
        proven.append(type(module).__name__)
        return original(find, module, parts)

    monkeypatch.setattr(mlps.proof, "proven", spied)
    made = [MLP(functools.partial(F.gelu, approximate="tanh")) for _ in range(20)]
    liger_kernel.patch(nn.Sequential(build("llama", num_hidden_layers=20), *made))
    once = ["LlamaDecoderLayer", "LlamaMLP", "LlamaRMSNorm", "MLP", "SiLUActivation"]
    assert sorted(proven) == once


class Called:
    """An activation that is no module: what it reads may change where nobody looks."""

    def __init__(self, beta: float = 1.0):
        self.beta = beta

    def __call__(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(self.beta * x)


def closed_over(held: list[float]) -> Callable[[Tensor], Tensor]:
    return lambda x: x * torch.sigmoid(held[0] * x)


class OfAnArray(MLP):
    def activated(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(float(self.held[0]) * x)


@pytest.mark.parametrize("how", ["object", "method", "closure", "array"])
def test_what_may_change_unseen_is_left_alone(how: str) -> None:
    called, held, array = Called(), [1.0], np.ones(1)
    module: Any = {
        "object": lambda: MLP(called),
        "method": lambda: MLP(called.__call__),
        "closure": lambda: MLP(closed_over(held)),
        "array": lambda: OfAnArray(held=array),
    }[how]()
    assert rows(module) == [None]
    called.beta = held[0] = array[0] = 4.0
    theirs = drawn(MLP(Swish(4.0)))
    module.load_state_dict(theirs.state_dict())
    assert torch.equal(module(X), theirs(X))
