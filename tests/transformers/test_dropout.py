"""Dropout stays on, adapters draw in their order, and no random state is touched by a proof."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoConfig

import liger_kernel
from liger_kernel.transformers.patching.sites import experts, mlps, norms, relu_squared, rope
from tests.transformers.steps import assert_all_no_worse, step
from tests.transformers.test_facts import SIZE, X, assert_same, patched, rows
from tests.transformers.test_structure import Calls, drawn
from tests.transformers.tiny import batch, build
from tests.transformers.zoo import build as zoo
from tests.transformers.zoo import check, inputs

# -- dropout -----------------------------------------------------------------------------------------------------------


GATED_T5 = {"d_model": SIZE, "d_ff": 48, "feed_forward_proj": "gated-gelu", "dropout_rate": 0.3}
DROPPING: dict[str, tuple[str, dict[str, Any]]] = {
    "t5": ("T5DenseGatedActDense", GATED_T5),
    "mt5": ("MT5DenseGatedActDense", GATED_T5),
    "umt5": ("UMT5DenseGatedActDense", GATED_T5),
    "longt5": ("LongT5DenseGatedActDense", GATED_T5),
    "t5gemma": ("T5GemmaMLP", {"dropout_rate": 0.3}),
    "modernbert": ("ModernBertMLP", {"mlp_dropout": 0.3}),
    "seed_oss": ("SeedOssMLP", {"residual_dropout": 0.3}),
}


def dropping(model_type: str) -> nn.Module:
    name, settings = DROPPING[model_type]
    file = pytest.importorskip(f"transformers.models.{model_type}.modeling_{model_type}")
    made = AutoConfig.for_model(model_type, **settings)
    if model_type == "t5gemma":
        made = made.encoder
        made.dropout_rate = 0.3
    if "d_model" not in settings:
        made.hidden_size, made.intermediate_size = SIZE, 48
    return drawn(getattr(file, name)(made))


@pytest.mark.parametrize("training", [False, True], ids=["patched in eval", "patched in training"])
@pytest.mark.parametrize("model_type", DROPPING)
def test_dropout_stays_on(model_type: str, training: bool, calls: Calls) -> None:
    theirs = dropping(model_type).train(training)
    ours = patched(theirs)
    calls.clear()
    for mode in (True, False, True):
        assert_same(ours.train(mode), theirs.train(mode))
    assert calls["glu"] >= 3  # the rest of the module is replaced
    for child in (c for m in (ours, theirs) for c in m.children() if type(c) is nn.Dropout):
        child.p = 0.7
    for module in (ours, theirs):
        if hasattr(module, "residual_dropout"):
            module.residual_dropout = 0.7
    assert_same(ours, theirs)


def test_who_watches_a_dropout_sees_its_calls(calls: Calls) -> None:
    ours = patched(dropping("t5")).eval()
    calls.clear()
    seen = []
    ours.dropout.register_forward_hook(lambda module, args, output: seen.append(output.shape))
    ours(X)
    assert seen == [(*X.shape[:-1], 48)]
    assert calls["glu"] == 1


class Rare(nn.Module):
    """Drops so little that no result shows it."""

    def __init__(self) -> None:
        super().__init__()
        self.rate, self.act = 1e-9, nn.SiLU()
        self.gate, self.up = nn.Linear(SIZE, 48), nn.Linear(SIZE, 48)
        self.down = nn.Linear(48, SIZE)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.dropout(self.act(self.gate(x)), self.rate, self.training) * self.up(x))


def test_random_numbers_that_change_nothing_are_drawn_all_the_same() -> None:
    assert rows(Rare()) == [None]
    never = Rare()
    never.rate = 0.0
    assert rows(never) == ["LigerSwiGLU"]
    ours = patched(never)
    ours.rate = never.rate = 0.5
    assert_same(ours, never)


class UpFirst(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.act = nn.SiLU()
        self.gate, self.up = nn.Linear(SIZE, 48), nn.Linear(SIZE, 48)
        self.down = nn.Linear(48, SIZE)

    def forward(self, x: Tensor) -> Tensor:
        up = self.up(x)
        return self.down(self.act(self.gate(x)) * up)


class Adapted(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.dropout(x, 0.3, self.training))


def test_adapters_draw_their_dropout_in_the_order_of_the_module() -> None:
    theirs = drawn(UpFirst())
    for name in ("gate", "up", "down"):
        linear = getattr(theirs, name)
        adapted = Adapted(linear.in_features, linear.out_features)
        adapted.load_state_dict(linear.state_dict())
        setattr(theirs, name, adapted)
    assert_same(patched(theirs), theirs)


class Bypassing(UpFirst):
    """Computes without a call of `down`, whose hooks and adapters have no effect then."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self.act(self.gate(x)) * self.up(x), self.down.weight, self.down.bias)


def test_a_linear_that_is_not_called_is_not_called_by_us() -> None:
    assert rows(Bypassing()) == [None]


# -- random states -----------------------------------------------------------------------------------------------------


class DrawingNorm(nn.Module):
    """Draws from every generator that there is."""

    eps = 1e-6

    def forward(self, x: Tensor) -> Tensor:
        noise = random.random() + np.random.rand() + torch.rand(())
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps) * noise


def test_no_random_state_is_touched() -> None:
    for find in (experts, mlps, norms, relu_squared):
        find.find_plan.cache_clear()
    rope.prove.cache_clear()
    models = [
        nn.Sequential(DrawingNorm(), dropping("seed_oss")),
        build("llama", attention_dropout=0.3),
    ]
    for model in models:
        before = torch.get_rng_state(), random.getstate(), str(np.random.get_state())
        liger_kernel.patch(model)
        liger_kernel.unpatch(model)
        liger_kernel.patch(model)
        assert torch.equal(torch.get_rng_state(), before[0])
        assert (random.getstate(), str(np.random.get_state())) == before[1:]


def test_seeds_of_other_devices_are_not_set(monkeypatch: pytest.MonkeyPatch) -> None:
    """`torch.manual_seed` sets those of all devices, at once or when they start."""

    def refuse(*args: Any) -> None:
        raise AssertionError("seeded")

    for find in (experts, mlps, norms, relu_squared):
        find.find_plan.cache_clear()
    rope.prove.cache_clear()
    for name in ("manual_seed", "seed", "fork_rng"):
        monkeypatch.setattr(torch, name, refuse, raising=False)
        monkeypatch.setattr(torch.random, name, refuse)
    monkeypatch.setattr(torch.cuda, "manual_seed_all", refuse)
    assert liger_kernel.patch(nn.Sequential(dropping("t5"), UpFirst())).replaced


def test_masks_after_patching_are_those_of_the_unpatched_run() -> None:
    def masked(dtype: torch.dtype, patch: bool) -> dict[str, Tensor]:
        model = build("llama", dtype, attention_dropout=0.3)
        torch.manual_seed(5)
        if patch:
            liger_kernel.patch(model)
        first = torch.rand(8)
        outputs, grads = step(model, **batch())
        return {"first": first, "loss": outputs.loss.detach(), **grads}

    cases = (torch.float32, True), (torch.float64, False), (torch.float32, False)
    assert_all_no_worse(*(masked(*case) for case in cases))


WHOLE = {
    "longt5": "LongT5ForConditionalGeneration",
    "modernbert": "ModernBertForMaskedLM",
    "mt5": "MT5ForConditionalGeneration",
    "t5": "T5ForConditionalGeneration",
    "t5gemma": "T5GemmaForConditionalGeneration",
    "umt5": "UMT5ForConditionalGeneration",
}


@pytest.mark.parametrize("model_type", WHOLE)
def test_whole_models_outside_of_the_zoo(model_type: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The zoo has those of `AutoModelForCausalLM` and `AutoModelForImageTextToText`."""
    if model_type in ("t5", "longt5"):
        settings = {"feed_forward_proj": "gated-gelu", "decoder_start_token_id": 0}
        monkeypatch.setitem(zoo.ARGUMENTS, model_type, settings)
    entry = zoo.Entry(model_type, WHOLE[model_type], "other")
    result = check.Result(model_type, entry.class_name)
    model = check.built(entry, 0.2)
    check.check_dropout(model, inputs.text(), result)
    assert result.drops
    plans = {row.kind: row.by for row in liger_kernel.patch(model).replaced}
    assert str(plans["mlp"]).startswith("LigerGeGLU")
