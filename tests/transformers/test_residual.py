"""Residual sums in one op with the norm after them: where, and that nobody sees anything but tensors."""

from __future__ import annotations

import collections
import copy
import pickle
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import liger_kernel
from liger_kernel.backends import use_implementation
from liger_kernel.testing import Make, assert_no_worse
from liger_kernel.transformers.patching.sums import Sum
from tests.transformers.steps import assert_all_no_worse, assert_same_step, named_step, snapshot
from tests.transformers.tiny import batch, build

Calls = collections.Counter[str]
USUAL = "sums with input_layernorm, post_attention_layernorm"
SANDWICH = "sums with input_layernorm, pre_feedforward_layernorm"


def rows(report: Any) -> set[str]:
    return {row.by or row.reason for row in report.rows if row.kind == "residual"}


@pytest.mark.parametrize(
    ("model_type", "expected", "norms"),
    [("llama", USUAL, 1), ("gemma2", SANDWICH, 5), ("qwen3", USUAL, 1), ("olmo2", None, 5)],
)
def test_report_step_and_unpatch(
    model_type: str, expected: str | None, norms: int, calls: Calls
) -> None:
    """OLMo 2 norms what it adds, not the sum."""
    model = build(model_type)
    before = snapshot(model)
    assert rows(liger_kernel.patch(model)) == ({expected} if expected else set())
    assert ("LigerResidual[" in repr(model)) == bool(expected)
    copied = pickle.loads(pickle.dumps(copy.deepcopy(model)))
    for one in (model, copied):
        calls.clear()
        one(**batch())
        assert calls["fused_add_rms_norm"] == (4 if expected else 0)
        assert calls["rms_norm"] == norms
    assert_same_step(model_type, torch.float32, copied)
    liger_kernel.unpatch(model)
    assert snapshot(model).keys() == before.keys()


@pytest.mark.parametrize("options", [{"residual": False}, {"rms_norm": False}], ids=str)
def test_switched_off(options: dict[str, bool], calls: Calls) -> None:
    model = build("llama")
    assert not rows(liger_kernel.patch(model, **options))
    model(**batch())
    assert calls["fused_add_rms_norm"] == 0


@pytest.mark.parametrize("before", [False, True])
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointed(use_reentrant: bool, before: bool, calls: Calls) -> None:
    """Before or after `patch`: transformers 5.24 begins the checkpoint in the forward of the layer's class."""
    model = build("llama")
    for step in (liger_kernel.patch, None)[:: -1 if before else 1]:
        if step is None:
            model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
        else:
            step(model)
    model.enable_input_require_grads()
    model.train()(**batch()).loss.backward()
    assert calls["fused_add_rms_norm"] == 8
    assert_same_step("llama", torch.float32, model)


def test_gradients_of_hidden_states() -> None:
    """Of each as a whole: of what the layers add to it, and of what they norm."""

    def gradients(model: nn.Module) -> dict[str, Tensor]:
        outputs = model(**batch(), output_hidden_states=True, output_attentions=True)
        assert len(outputs.attentions) == 2
        for h in outputs.hidden_states:
            assert type(h) is Tensor
            h.retain_grad()
        outputs.loss.backward()
        return {str(i): h.grad for i, h in enumerate(outputs.hidden_states)}

    ours = build("llama")
    liger_kernel.patch(ours)
    assert_all_no_worse(
        gradients(ours), gradients(build("llama", torch.float64)), gradients(build("llama"))
    )


def test_what_others_see(calls: Calls) -> None:
    """A hook on a layer or its parts gets tensors; one on a norm has the layer run HF's code."""
    model = build("llama")
    report = liger_kernel.patch(model)
    seen: list[Any] = []
    layer = model.model.layers[0]
    for module in (layer, layer.self_attn, layer.mlp, layer.mlp.gate_proj):
        module.register_forward_hook(
            lambda m, a, k, y: seen.extend((*a, *k.values(), y)), with_kwargs=True
        )
    model(**batch())
    assert calls["fused_add_rms_norm"] == 4
    handle = layer.post_attention_layernorm.register_forward_pre_hook(lambda m, a: seen.extend(a))
    calls.clear()
    model(**batch())
    assert (calls["fused_add_rms_norm"], calls["rms_norm"]) == (2, 3)
    assert not [value for value in seen if isinstance(value, Sum)]
    reasons = [row.reason for row in report.skipped]
    assert reasons == ["post_attention_layernorm is hooked, or no norm of ours any more"]
    handle.remove()
    assert not report.skipped


def test_cached_generation_and_keywords(calls: Calls) -> None:
    model, stock = build("qwen3").eval(), build("qwen3").eval()
    liger_kernel.patch(model)
    inputs = {"input_ids": batch()["input_ids"], "max_new_tokens": 4, "do_sample": False}
    assert torch.equal(model.generate(**inputs), stock.generate(**inputs))
    assert calls["fused_add_rms_norm"] == 4 * 4
    x = Make(torch.float32).randn(2, 3, 48)
    angles = model.model.rotary_emb(x, torch.arange(3)[None])
    given = {"hidden_states": x, "attention_mask": None, "position_embeddings": angles}
    ours, theirs = (m.model.layers[0](**given) for m in (model, stock))
    assert type(ours) is Tensor
    assert_no_worse("layer", ours, theirs.double(), theirs)


def test_under_autocast() -> None:
    """Sums of two dtypes are PyTorch's; gradients still meet in the norm."""

    def step(model: nn.Module) -> dict[str, Tensor]:
        with torch.autocast("cpu", torch.bfloat16):
            return named_step(model, batch())

    ours = build("llama")
    liger_kernel.patch(ours)
    high = named_step(build("llama", torch.float64), batch())
    assert_all_no_worse(step(ours), high, step(build("llama")))


# -- forms of layers ---------------------------------------------------------------------------------------------------


class Norm(nn.Module):
    def __init__(self, size: int = 32):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.rand(size) + 0.5), 1e-6

    def forward(self, x: Tensor) -> Tensor:
        variance = x.float().pow(2).mean(-1, keepdim=True)
        return self.weight * (x.float() * torch.rsqrt(variance + self.eps)).to(x.dtype)


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.second = Norm(), Norm()
        self.attn, self.mlp = nn.Linear(32, 32), nn.Linear(32, 32)
        self.drop = nn.Dropout(0.2)

    def forward(self, x: Tensor, mask: Tensor | None) -> Any:
        x = self.drop(self.attn(self.norm(x))) + x
        return x + self.mlp(self.second(x)), mask


class Parallel(Layer):
    """Two norms of one tensor, in front of all sums."""

    def forward(self, x: Tensor) -> Tensor:
        return x + self.attn(self.norm(x)) + self.mlp(self.second(x))


class Scaled(Layer):
    def forward(self, x: Tensor) -> Tensor:
        x = 0.5 * x + self.attn(self.norm(x))
        return (x + self.mlp(self.second(x))) * 2


class InPlace(Layer):
    def forward(self, x: Tensor) -> Tensor:
        h = self.attn(self.norm(x))
        h += x
        return torch.add(h, self.mlp(self.second(h)), alpha=2)


class Bare(Layer):
    """Its MLP gets a sum without a norm."""

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm(x))
        return self.second(x + self.mlp(x))


class Keeps(Layer):
    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm(x))
        self.seen = x
        return x + self.mlp(self.second(x))


FORMS: dict[type[Layer], tuple[str | None, int]] = {
    Layer: ("sums with norm, second", 2),
    Parallel: ("sums with norm, second", 2),
    Scaled: ("sums with norm", 1),
    InPlace: ("sums with norm", 1),
    Bare: (None, 0),
    Keeps: (None, 0),
}


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.__name__)
def test_forms(form: type[Layer], calls: Calls) -> None:
    expected, count = FORMS[form]
    torch.manual_seed(0)
    stock = nn.ModuleList([form()])
    model = copy.deepcopy(stock)
    assert rows(liger_kernel.patch(model, fused_linear_cross_entropy=False)) == (
        {expected} if expected else set()
    )
    x = Make(torch.float32).randn(3, 5, 32)

    def run(layers: nn.ModuleList, dtype: torch.dtype) -> dict[str, Tensor]:
        torch.manual_seed(1)
        leaf = x.detach().to(dtype, copy=True).requires_grad_()
        more = (None,) if form is Layer else ()
        y = layers.to(dtype)[0](leaf, *more)
        y = y[0] if isinstance(y, tuple) else y
        y.square().sum().backward()
        grads = {name: p.grad for name, p in layers.named_parameters()}
        return {"y": y.detach(), "x": leaf.grad, **grads}

    high, low = run(copy.deepcopy(stock), torch.float64), run(stock, torch.float32)
    for implementation in (None, "triton"):
        calls.clear()
        model.zero_grad()
        with use_implementation(implementation):
            ours = run(model, torch.float32)
        assert calls["fused_add_rms_norm"] == count
        assert_all_no_worse(ours, high, low)


def test_a_sum_is_a_tensor_to_everybody_else() -> None:
    x, more = Make(torch.float32).randn(4, 6), Make(torch.float32).randn(4, 6)
    whole = x + more
    for value in (Sum(x, more), Sum(x) + more, more + Sum(x), torch.add(Sum(x), more)):
        assert isinstance(value, Sum)
        assert (value.shape, value.dtype, value.ndim) == (x.shape, x.dtype, 2)
        assert torch.equal(value.materialize(), whole)
    for value in (
        Sum(x, more) * 2,
        2 * Sum(x, more),
        Sum(x, more).mul(2),
        torch.mul(Sum(x, more), 2),
    ):
        assert torch.equal(value, whole * 2)
    other: Any
    for other in (1.0, more[0], more.double(), nn.Parameter(more), SimpleNamespace(x=1).x):
        assert torch.equal(Sum(x) + other, x + other)
    assert torch.equal(Sum(x, more)[1:], whole[1:])
