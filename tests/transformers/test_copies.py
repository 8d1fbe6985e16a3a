"""Replicas, copies and pickles of a patched model, modules in two places, and the globals of a modeling file."""

from __future__ import annotations

import copy
import importlib
import pickle
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.models.llama import modeling_llama

import liger_kernel
from liger_kernel.testing import Make
from tests.transformers.steps import assert_all_no_worse, fused, step
from tests.transformers.test_facts import MLP, SIZE, X, patched, times_two
from tests.transformers.test_structure import Calls
from tests.transformers.tiny import batch, build

# -- copies ------------------------------------------------------------------------------------------------------------


def replicated(module: nn.Module) -> Any:
    """As `nn.parallel.replicate` does, to the same device."""
    replica = module._replicate_for_data_parallel()
    for name, p in module._parameters.items():
        setattr(replica, name, None if p is None else p.clone())
    for name, child in module._modules.items():
        replica._modules[name] = None if child is None else replicated(child)
    return replica


def test_replicas_compute_with_their_own_weights(calls: Calls) -> None:
    model = build("llama")
    liger_kernel.patch(model)
    for module in model.modules():
        replica = replicated(module)
        for name, value in vars(replica).items():
            assert getattr(value, "args", (replica,))[0] is replica, name
    inner = model.model
    replica = replicated(inner)
    ids = batch()["input_ids"]
    expected = inner(ids)[0]
    calls.clear()
    assert torch.equal(replica(ids)[0], expected)
    assert calls["glu"] == calls["rope"] == 2
    assert (calls["rms_norm"], calls["fused_add_rms_norm"]) == (1, 4)
    with torch.no_grad():
        for p in inner.parameters():
            p.zero_()
    assert torch.equal(replica(ids)[0], expected)


def test_shallow_copies_compute_with_their_own_attributes() -> None:
    """They share parameters and children with the original, and what is set on them is theirs."""
    model, theirs = build("llama"), build("llama")
    liger_kernel.patch(model)
    for copied in (copy.copy(m.model.norm) for m in (model, theirs)):
        copied.variance_epsilon = 7.0
        copied._parameters = {"weight": nn.Parameter(torch.full((48,), 2.0))}
        assert copied(torch.ones(1, 48)).unique().item() == pytest.approx(2 / 8**0.5)
        assert "Liger" not in repr(copied)
    for shared in (
        model,
        theirs,
    ):  # one more layer, with the weights of the first and a cache of its own
        layer = copy.copy(shared.model.layers[0])
        layer._modules = dict(layer._modules)
        layer.self_attn = copy.copy(layer.self_attn)
        layer.self_attn.layer_idx = 2
        shared.model.layers.append(layer)
        shared.config.num_hidden_layers = 3
    ids, more = batch()["input_ids"], {"max_new_tokens": 4, "eos_token_id": None}
    assert torch.equal(model.eval().generate(ids, **more), theirs.eval().generate(ids, **more))


def test_a_shallow_copy_of_a_model_is_not_patched_itself() -> None:
    model = build("llama").train()
    report = liger_kernel.patch(model)
    copied: Any = copy.copy(model)
    assert copied.model is model.model
    assert not fused(copied(**batch()))
    liger_kernel.unpatch(copied)
    assert not report.skipped
    liger_kernel.patch(copied)
    assert fused(copied(**batch()))
    assert fused(model(**batch()))


def test_parts_that_were_copied_into_the_model() -> None:
    """As PEFT puts a copy in the place of a module that is to be saved; it is what the report is about then."""
    model, theirs = build("llama"), build("llama")
    report = liger_kernel.patch(model)
    for path in ("model.norm", "model.layers.0.mlp", "lm_head"):
        model.set_submodule(path, copy.deepcopy(model.get_submodule(path)))
    assert not report.skipped
    assert fused(model.train()(**batch()))
    assert liger_kernel.patch(model) is report
    liger_kernel.unpatch(model)
    for (path, module), stock in zip(model.named_modules(), theirs.modules(), strict=True):
        assert type(module) is type(stock), path
        assert vars(module).keys() == vars(stock).keys(), path


def test_patch_sees_parts_that_are_new() -> None:
    model = build("llama")
    before = liger_kernel.patch(model)
    model.model.norm = build("llama").model.norm
    assert [row.path for row in before.skipped] == ["model.norm"]
    report = liger_kernel.patch(model)
    assert report is not before
    assert not report.skipped
    model.model.layers.extend(build("llama").model.layers)
    assert len(liger_kernel.patch(model).replaced) == len(report.rows) + 10
    assert not liger_kernel.patch(model).skipped


def test_a_pickle_is_proven_again(monkeypatch: pytest.MonkeyPatch, calls: Calls) -> None:
    theirs = build("llama")
    ours = copy.deepcopy(theirs)
    liger_kernel.patch(ours)
    kept = pickle.dumps(ours)
    calls.clear()
    twin = pickle.loads(kept)
    step(twin, **batch())
    assert calls["glu"] == calls["rope"] == 2
    twin = pickle.loads(kept)  # as in a process where the class is another
    with monkeypatch.context() as other:
        other.setattr(modeling_llama.LlamaRMSNorm, "forward", times_two)
        assert torch.equal(twin.model.norm(X), 2 * X)
    twin.model.norm.variance_epsilon = theirs.model.norm.variance_epsilon = 0.5
    x = torch.randn(3, theirs.config.hidden_size)
    assert torch.equal(twin.model.norm(x), theirs.model.norm(x))


def test_the_signature_is_that_of_the_class() -> None:
    import inspect

    model = build("llama")
    before = [inspect.signature(m.forward) for m in model.modules()]
    liger_kernel.patch(model)
    modules = [m for m in model.modules() if m is not model.lm_head]
    after = [inspect.signature(m.forward) for m in model.modules()]
    assert len(modules) + 1 == len(after)
    assert before[:-1] == after[:-1]


# -- modules in two places ---------------------------------------------------------------------------------------------


def test_a_shared_module_is_replaced_once() -> None:
    norm = modeling_llama.LlamaRMSNorm(SIZE)
    model = nn.ModuleDict({"a": norm, "b": nn.Sequential(norm)})
    before = set(vars(norm))
    liger_kernel.patch(model["b"])
    assert liger_kernel.patch(model).replaced
    liger_kernel.unpatch(model)
    liger_kernel.unpatch(model["b"])
    assert set(vars(norm)) == before


def test_unpatch_after_a_change() -> None:
    theirs = MLP()
    model = nn.Sequential(copy.deepcopy(theirs))
    before = {name: set(vars(m)) for name, m in model.named_modules()}
    liger_kernel.patch(model)
    for module in (model[0], theirs):
        module.scale, module.act = 3.0, nn.GELU()
    liger_kernel.unpatch(model)
    assert torch.equal(model[0](X), theirs(X))
    for name, module in model.named_modules():
        if name != "0.act":
            assert set(vars(module)) - {"scale"} == before[name]
    assert not [n for m in model.modules() for n in vars(m) if n.startswith("_liger")]


# -- rotary functions --------------------------------------------------------------------------------------------------


@pytest.fixture
def modeling(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A modeling file of somebody's own."""
    (tmp_path / "modeling_of_mine.py").write_text(ROTARY)
    monkeypatch.syspath_prepend(tmp_path)
    yield importlib.import_module("modeling_of_mine")
    monkeypatch.delitem(importlib.sys.modules, "modeling_of_mine")  # type: ignore[attr-defined]


ROTARY = """
import torch
from torch import nn

SCALE = 1.0

def rotate_half(x):
    a, b = x.chunk(2, -1)
    return torch.cat((-b, a), -1)

def rotate_wrongly(x):
    a, b = x.chunk(2, -1)
    return torch.cat((b, -a), -1)

def apply_rotary(q, k, cos, sin, unsqueeze_dim=1):
    cos, sin = cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim)
    return q * cos + rotate_half(q) * sin, k * cos + rotate_half(k) * sin

def apply_nothing(q, k, cos, sin, unsqueeze_dim=1):
    return 3 * q, 2 * k

def apply_rotary_later(q, k, cos, sin, unsqueeze_dim=1):
    cos, sin = cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim)
    return k * cos + rotate_half(k) * sin, q * cos + rotate_half(q) * sin

class Attention(nn.Module):
    def forward(self, q, k, cos, sin):
        q, k = apply_rotary(q, k, cos, sin)
        return q * SCALE, k
"""

HEADS = Make(torch.float32).randn(2, 3, 5, 16), Make(torch.float32, seed=1).randn(2, 3, 5, 16)
ANGLES = torch.cat((Make(torch.float32, seed=2).randn(2, 5, 8),) * 2, -1)
ROTATED = (*HEADS, ANGLES.cos(), ANGLES.sin())


def assert_same_heads(ours: nn.Module, theirs: nn.Module) -> None:
    high = theirs(*(t.double() for t in ROTATED))
    pairs = zip(ours(*ROTATED), high, theirs(*ROTATED), strict=True)
    assert_all_no_worse(*(dict(enumerate(values)) for values in zip(*pairs, strict=True)))


@pytest.mark.parametrize(
    ("name", "value", "rotated"),
    [
        ("apply_rotary", "apply_nothing", False),
        ("apply_rotary", "apply_rotary_later", False),
        ("rotate_half", "rotate_wrongly", False),
        ("SCALE", 5.0, True),
    ],
)
def test_a_global_assigned_later(
    modeling: Any, name: str, value: Any, rotated: bool, calls: Calls
) -> None:
    """Honoured by modules that are patched already, and by those that are patched later."""
    ours, theirs = patched(modeling.Attention()), modeling.Attention()
    again = patched(modeling.Attention())
    assert_same_heads(ours, theirs)
    value = getattr(modeling, value) if isinstance(value, str) else value
    original = getattr(modeling, name)
    setattr(modeling, name, value)
    model = nn.Sequential(modeling.Attention())
    report = liger_kernel.patch(model)
    assert bool(report.replaced) is rotated
    calls.clear()
    for module in (ours, again, model[0], copy.deepcopy(ours)):
        assert_same_heads(module, theirs)
    assert calls["rope"] == (4 if rotated else 0)
    setattr(modeling, name, original)
    assert_same_heads(ours, theirs)
    calls.clear()
    assert_same_heads(ours, theirs)
    assert calls["rope"] == 1


def test_a_forward_assigned_to_the_class_later(
    modeling: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours = patched(modeling.Attention())

    def forward(self: Any, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> Any:
        return q, k

    monkeypatch.setattr(modeling.Attention, "forward", forward)
    assert ours(*ROTATED)[0] is HEADS[0]
