"""`liger_kernel.transformers.model.<type>`: one forward under many names, on a class or on one model."""

from __future__ import annotations

import copy
import importlib
import inspect
import pickle
import sys
import types
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers.models.llama.modeling_llama import LlamaForCausalLM
from transformers.models.mistral.modeling_mistral import MistralForCausalLM

import liger_kernel
from liger_kernel import compat
from liger_kernel.compat.forwards import FORWARDS
from liger_kernel.testing import assert_no_worse
from liger_kernel.transformers.patching import OPTIONS
from tests.transformers.here import ENTRIES
from tests.transformers.steps import assert_same_step, step
from tests.transformers.test_copies import replicated
from tests.transformers.tiny import batch, build
from tests.transformers.zoo import check, inputs

pytestmark = pytest.mark.usefixtures("quiet_on_one_thread")

#: the model type that a forward is for, where its module has another name
OF = {
    "gemma3.causal_forward": "gemma3_text",
    "gemma4.causal_forward": "gemma4_text",
    "hunyuan_v1.lce_forward": "hunyuan_v1_moe",
    "qwen3_5.lce_forward": "qwen3_5_text",
    "qwen3_5_moe.lce_forward": "qwen3_5_moe_text",
}
ALL = [f"{model_type}.{name}" for model_type, names in FORWARDS.items() for name in names]
ONLY_LOSS = {option.name: option.name == "fused_linear_cross_entropy" for option in OPTIONS}
#: dense, routed, with images, with soft caps
EXACTLY = ("llama", "mixtral", "qwen2_vl", "gemma3.multimodal_forward", "falcon_h1")


def forward_of(where: str) -> Any:
    model_type, name = where.split(".")
    return getattr(importlib.import_module(f"liger_kernel.transformers.model.{model_type}"), name)


@pytest.fixture
def lce_forward() -> Any:
    return forward_of("llama.lce_forward")


@pytest.fixture
def on_the_class(lce_forward: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LlamaForCausalLM, "forward", lce_forward)


@pytest.mark.parametrize("where", ALL)
def test_it_is_the_forward_of_a_patched_model(where: str, calls: dict[str, int]) -> None:
    entry = ENTRIES[OF.get(where, where.split(".")[0])]
    stock = check.built(entry)
    given = inputs.inputs(entry, copy.deepcopy(stock))
    ours, patched = copy.deepcopy(stock), copy.deepcopy(stock)
    ours.forward = types.MethodType(forward_of(where), ours)  # type: ignore[method-assign]
    loss, grads, outputs = check.step(ours, given)
    assert calls["cross_entropy"]
    assert outputs.logits is None
    assert type(outputs) is type(stock(**given))
    liger_kernel.patch(patched, logits="none", **ONLY_LOSS)
    assert not check._unequal((loss, grads), check.step(patched, given)[:2])
    assert ours(**given, skip_logits=False).logits.shape[-1] > 1
    ours.eval()
    assert ours(**given).logits is not None
    assert ours(**given, skip_logits=True).logits is None
    del given["labels"]
    assert ours(**given, skip_logits=True, return_dict=None).logits is not None
    named = {
        n
        for n, p in inspect.signature(ours.forward).parameters.items()
        if p.kind == p.POSITIONAL_OR_KEYWORD
    }
    assert {
        n for n in given if "pixel" in n or "grid" in n
    } <= named  # `generate` asks the signature


@pytest.mark.parametrize("where", EXACTLY)
def test_loss_and_gradients(where: str) -> None:
    where = where if "." in where else f"{where}.lce_forward"
    entry = ENTRIES[where.split(".")[0]]
    fresh = check.built(entry)
    given = inputs.inputs(entry, copy.deepcopy(fresh))
    model = copy.deepcopy(fresh)
    model.forward = types.MethodType(forward_of(where), model)  # type: ignore[method-assign]
    check.compare(model, fresh, given, check.Result(str(entry), entry.class_name))


def test_modules() -> None:
    from liger_kernel.transformers.model import gemma4, llama

    assert llama is importlib.import_module("liger_kernel.transformers.model.llama")
    assert importlib.reload(llama) is sys.modules["liger_kernel.transformers.model.llama"]
    assert llama.lce_forward is llama.lce_forward
    assert llama.lce_forward.__module__ == llama.__name__
    assert pickle.loads(pickle.dumps(llama.lce_forward)) is llama.lce_forward
    from liger_kernel.transformers import outputs

    name = "LigerGemma4CausalLMOutputWithPast"
    if importlib.util.find_spec("transformers.models.gemma4"):
        assert getattr(gemma4, name) is getattr(outputs, name)
    for module, name in ((llama, "causal_forward"), (gemma4, "lce_forward"), (llama, "F")):
        assert not hasattr(module, name)
    assert importlib.util.find_spec("liger_kernel.transformers.model.nothing") is None
    assert "liger_kernel.transformers.model.llama" not in compat.ALIASES


def test_on_one_model(lce_forward: Any) -> None:
    model = build("llama")
    own = copy.deepcopy(model)
    model.forward = types.MethodType(lce_forward, model)  # type: ignore[method-assign]
    assert_same_step("llama", torch.float32, model, **batch())
    positions = list(inspect.signature(lce_forward).parameters)[1:]
    values = [batch().get(name) for name in positions[: positions.index("labels") + 1]]
    assert model(*values).logits is None
    assert model(*values, return_dict=False)[1] is None
    twin = copy.deepcopy(model)
    assert twin.forward.__self__ is twin
    assert twin(**batch()).logits is None
    assert isinstance(own(**batch()).logits, torch.Tensor), "one model was patched, not its class"
    liger_kernel.unpatch(model)
    assert model.forward.__func__ is lce_forward, "it is the caller's"
    assert model(**batch()).logits is None, "the model's forward still says so"
    with pytest.raises(TypeError, match="input_ids twice"):
        model(batch()["input_ids"], **batch())
    with pytest.raises(TypeError, match="takes 13 arguments, got 14"):
        model(*[None] * 14)


@pytest.mark.usefixtures("on_the_class")
def test_on_the_class(lce_forward: Any) -> None:
    model = build("llama")
    plain = copy.deepcopy(model)
    first = step(model, **batch())
    assert first[0].logits is None
    assert "forward" not in vars(model)
    report = liger_kernel.patch(plain)
    assert "fused linear cross entropy" in str(report), report
    lazy = step(plain, **batch())[0]
    assert lazy.loss == first[0].loss
    assert isinstance(lazy.logits, torch.Tensor), "as patch has it"
    again = pickle.loads(pickle.dumps(model))
    for one in (copy.deepcopy(model), again):
        loss, grads = step(one, **batch())
        assert loss.loss == first[0].loss
        assert all(torch.equal(grads[name], grad) for name, grad in first[1].items())
    liger_kernel.unpatch(model)
    assert model(**batch()).loss == first[0].loss
    assert model.generate(batch()["input_ids"], max_new_tokens=2, do_sample=False).shape == (3, 13)
    liger_kernel.patch(model, rms_norm=True, fused_linear_cross_entropy=False)
    assert model(**batch()).logits is not None, "the patch before decides on logits: lazy ones"
    assert str(model).count("LigerLMHead") == 1


@pytest.mark.usefixtures("one_graph", "on_the_class")
def test_compiled() -> None:
    torch._dynamo.reset()
    model = build("llama").train()
    eager = copy.deepcopy(model)(**batch())
    assert torch.compile(copy.deepcopy(model), backend="eager")(**batch()).loss == eager.loss
    model(**batch())  # what is new cannot be patched inside of one graph
    outputs = torch.compile(model, backend="eager", fullgraph=True)(**batch())
    assert outputs.loss == eager.loss
    assert outputs.logits is None


@pytest.mark.usefixtures("on_the_class")
@pytest.mark.parametrize("fused", [True, False])
def test_replicas_compute_with_their_own_weights(fused: bool) -> None:
    model = build("llama").train()
    expected = LlamaForCausalLM._liger_own_forward(model, **batch()).loss
    if fused:
        model(**batch())
    replica = replicated(model)
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    assert replica(**batch()).loss == expected


@pytest.mark.usefixtures("on_the_class")
@pytest.mark.parametrize("head", ["", "trained", "adapted"])
def test_adapters(head: str) -> None:
    """An adapter of the head is part of the loss."""
    peft = pytest.importorskip("peft")
    targets = ["q_proj", "lm_head"] if head == "adapted" else ["q_proj"]
    saved = ["lm_head"] if head == "trained" else None
    config = peft.LoraConfig(target_modules=targets, modules_to_save=saved, init_lora_weights=False)
    wide = peft.get_peft_model(build("llama", torch.float64), config).train()
    model = copy.deepcopy(wide).float()
    inner = wide.get_base_model()
    low = LlamaForCausalLM._liger_own_forward(copy.deepcopy(inner).float(), **batch())
    high = LlamaForCausalLM._liger_own_forward(inner, **batch())
    found = model(**batch())
    assert_no_worse("loss", found.loss, high.loss, low.loss)
    assert found.logits is None
    found.loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_called_by_a_subclass(lce_forward: Any) -> None:
    class Mine(LlamaForCausalLM):
        runs = 0

        def forward(self, *args: Any, **kwargs: Any) -> Any:
            Mine.runs += 1
            return lce_forward(self, *args, **kwargs)

    stock = build("llama")
    model = Mine(stock.config)
    model.load_state_dict(stock.state_dict())
    for runs in (1, 2):
        outputs = step(model, **batch())[0]
        assert Mine.runs == runs
        assert outputs.logits is None
    assert model(**batch(), skip_logits=False).logits is not None
    assert_same_step("llama", torch.float32, model, **batch())


def test_on_a_class_of_another_type(lce_forward: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    class Foreign(MistralForCausalLM):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return MistralForCausalLM.forward(self, *args, **kwargs)

    monkeypatch.delattr(MistralForCausalLM, "_liger_own_forward", raising=False)
    model = Foreign(build("mistral").config).train()
    model.forward = types.MethodType(lce_forward, model)  # type: ignore[method-assign]
    assert model(**batch()).logits is None
    monkeypatch.setattr(Foreign, "forward", lce_forward)
    with pytest.raises(TypeError, match=r"Foreign.forward was replaced.*model\.<type>"):
        model(**batch())


def test_options_of_the_loss(lce_forward: Any) -> None:
    """Options that HF's loss does not know count in evaluation, too."""
    model = build("llama")
    stock = build("llama")
    model.forward = types.MethodType(lce_forward, model)  # type: ignore[method-assign]
    labels = F.pad(batch()["labels"], (0, 1), value=-100)[:, 1:].reshape(-1)

    def truth(like: nn.Module, **options: Any) -> torch.Tensor:
        logits = like(**batch()).logits.flatten(0, 1)
        return F.cross_entropy(logits, labels, **options)

    weight = torch.linspace(0.5, 2, 131)
    for training in (True, False):
        model.train(training)
        found = model(**batch(), label_smoothing=0.2, accum_dtype=torch.float32)
        wide = truth(build("llama", torch.float64), label_smoothing=0.2)
        assert_no_worse("smoothed", found.loss, wide, truth(stock, label_smoothing=0.2))
        assert (found.logits is None) == training
        found = model(**batch(), ce_weight=weight, return_token_accuracy=True)
        wide = truth(build("llama", torch.float64), weight=weight.double())
        assert_no_worse("weighted", found.loss, wide, truth(stock, weight=weight))
        assert 0 <= found.token_accuracy <= 1
        assert model(**batch(), lse_square_scale=0.1).loss > truth(stock)
