"""A verdict is shared by modules that are provably equal, and by no others."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers.models.llama import modeling_llama

import liger_kernel
from liger_kernel.transformers.patching.sites import mlps, norms, relu_squared
from tests.transformers.test_facts import MLP, SIZE, Swish, rows
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
    for site in (mlps, norms, relu_squared):
        site.find_plan.cache_clear()
    proven = []
    original = mlps.proof.proven

    def spied(find: Any, module: nn.Module, parts: Any) -> Any:
        proven.append(type(module).__name__)
        return original(find, module, parts)

    monkeypatch.setattr(mlps.proof, "proven", spied)
    made = [MLP(functools.partial(F.gelu, approximate="tanh")) for _ in range(20)]
    liger_kernel.patch(nn.Sequential(build("llama", num_hidden_layers=20), *made))
    assert sorted(proven) == ["LlamaMLP", "LlamaRMSNorm", "MLP", "SiLUActivation"]
