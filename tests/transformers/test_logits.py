"""`output.logits` of a patched model: the tensor that the unpatched model would give, whenever it is read."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils.checkpoint import checkpoint
from transformers.modeling_outputs import CausalLMOutputWithPast

import liger_kernel
from liger_kernel.testing import assert_no_worse
from tests.transformers.here import stock_can
from tests.transformers.steps import (
    assert_all_no_worse,
    assert_full_gradient,
    focal,
    fused,
    outputs_of,
    patched,
    step,
)
from tests.transformers.tiny import VOCAB, batch, build

TYPES = ["llama", "gemma2"]  # as the head gives them, and soft-capped


# -- the state of the forward ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model_type", TYPES)
@pytest.mark.parametrize("first", [torch.no_grad, torch.inference_mode])
def test_values_without_gradients_first(first: Any, model_type: str) -> None:
    def use(outputs: Any) -> Tensor:
        with first():
            assert outputs.logits.argmax(-1).shape == (3, 11)
        return focal(outputs.logits, batch()["labels"]) + 1e-3 * outputs.loss

    assert_full_gradient(use, model_type)


def test_read_under_another_autocast() -> None:
    def autocast() -> Any:
        return torch.autocast("cpu", dtype=torch.bfloat16)

    outputs = outputs_of(patched())
    with autocast():
        assert outputs.logits.dtype == torch.float32
    assert torch.equal(outputs.logits, build("llama").train()(**batch()).logits)
    with autocast():
        outputs, expected = outputs_of(patched()), build("llama").train()(**batch())
    assert outputs.logits.dtype == expected.logits.dtype == torch.bfloat16
    high = build("llama", torch.float64).train()(**batch())
    assert_no_worse("logits", outputs.logits, high.logits, expected.logits)


def test_a_forward_in_inference_mode() -> None:
    model = patched()
    with torch.inference_mode():
        outputs = outputs_of(model)
    assert outputs.logits.is_inference()
    with torch.no_grad():
        outputs = outputs_of(model)
    assert not outputs.logits.requires_grad


def test_inside_the_forward_the_modes_are_those_of_the_head() -> None:
    """A model that looks at its logits without gradients, and then takes a loss that is not fused."""

    def with_loss(model: Any) -> Any:
        def loss(logits: Any, labels: Tensor, **others: Any) -> Tensor:
            with torch.no_grad():
                assert logits.argmax(-1).shape == labels.shape
            return focal(logits, labels)

        model.loss_function = loss
        return model.train()

    ours, low = (with_loss(m) for m in (build("llama"), build("llama")))
    liger_kernel.patch(ours)
    for model in (ours, low):
        model(**batch()).loss.backward()
    for (name, p), expected in zip(ours.named_parameters(), low.parameters(), strict=True):
        assert (p.grad is None) == (expected.grad is None), name
    assert torch.equal(ours.lm_head.weight.grad, low.lm_head.weight.grad)


class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 2

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad * 2


class Exponential(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x.exp())
        return x.exp()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad * ctx.saved_tensors[0]


class Tripled(torch.autograd.Function):
    """Its forward takes no ctx."""

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x * 3

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad * 3


USES: dict[str, Callable[[Tensor], Tensor]] = {
    "Function.apply": lambda x: Exponential.apply(x),
    "reentrant checkpoint": lambda x: checkpoint(torch.sin, x, use_reentrant=True),
    "as_tensor": lambda x: torch.as_tensor(x).square(),
    "isinstance": lambda x: sum(t.square() for t in [x] if isinstance(t, Tensor)),  # type: ignore[misc]
    "tree_map_only": lambda x: pytree.tree_map_only(Tensor, torch.square, {"x": x})["x"],
}


@pytest.mark.parametrize("name", USES)
def test_used_as_the_tensor_that_it_is(name: str) -> None:
    assert_full_gradient(lambda outputs: USES[name](outputs.logits).mean())


def test_what_is_made_without_gradients_has_none() -> None:
    model = patched()

    def loss(logits: Any, labels: Tensor, **others: Any) -> Tensor:
        with torch.no_grad():
            frozen = (logits * 2).flatten(0, 1)
        assert not frozen.requires_grad
        return F.cross_entropy(frozen, labels.flatten())

    model.loss_function = loss
    assert not model(**batch()).loss.requires_grad


@pytest.mark.parametrize("function", [Doubled, Exponential, Tripled], ids=lambda f: f.__name__)
def test_a_function_inside_the_forward(function: Any) -> None:
    """It records tensors alone, so that the loss would have no gradient, or a part of it."""
    model = patched()
    model.loss_function = lambda logits, **others: function.apply(logits).mean()
    with pytest.raises(
        RuntimeError, match=rf"^{function.__name__}\.apply.*fused_linear_cross_entropy=False"
    ):
        model(**batch())
    liger_kernel.patch(model, fused_linear_cross_entropy=False)
    model(**batch()).loss.backward()
    assert model.lm_head.weight.grad.norm() > 0


def then_written(write: Callable[[Any], Any], view: bool) -> Any:
    """A loss of what was made of the logits before `write` wrote into them."""

    def loss(logits: Any, labels: Tensor, *_: Any, **others: Any) -> Tensor:
        made = logits[:, :-1] if view else logits[:, :-1] * 2.0
        write(logits)
        return F.cross_entropy(made.reshape(-1, VOCAB).float(), labels[:, 1:].flatten())

    return loss


def scaled_by(logits: Any) -> None:
    logits *= 0.5


def biased(logits: Any) -> None:
    logits += torch.linspace(-1, 1, VOCAB)


def divided_by(logits: Any) -> None:
    logits /= torch.linspace(1, 2, VOCAB)


WRITES: dict[str, Callable[[Any], Any]] = {
    "an element": lambda logits: logits.__setitem__((..., 5), -9.0),
    "mul_": lambda logits: logits.mul_(0.5),
    "*=": scaled_by,
    "+=": biased,
    "/=": divided_by,
    "hook": lambda logits: logits.register_hook(lambda grad: grad * 0.5),
}


@pytest.mark.parametrize("view", [True, False], ids=["view", "copy"])
@pytest.mark.parametrize("write", WRITES)
@pytest.mark.parametrize("model_type", TYPES)
def test_written_to_in_the_forward(model_type: str, write: str, view: bool) -> None:
    """Views see it, copies do not, and the caller gets what was written to."""
    ours, low, high = build(model_type), build(model_type), build(model_type, torch.float64)
    liger_kernel.patch(ours)
    found = []
    for model in (ours, high, low):
        model.loss_function = then_written(WRITES[write], view)
        outputs, grads = step(model, **batch())
        found.append({"loss": outputs.loss, "logits": outputs.logits, **grads})
    assert_all_no_worse(*found)


@pytest.mark.parametrize("again", [False, True])
def test_a_scale_in_place_is_fused(again: bool) -> None:
    ours, low, high = build("llama"), build("llama"), build("llama", torch.float64)
    liger_kernel.patch(ours)

    def loss(logits: Any, labels: Tensor, **others: Any) -> Tensor:
        logits *= 0.5
        if again:
            logits /= 0.25
        return F.cross_entropy(logits.view(-1, VOCAB), labels.flatten())

    found = []
    for model in (ours, high, low):
        model.loss_function = loss
        outputs, grads = step(model, **batch())
        assert fused(outputs) == (model is ours)
        found.append({"loss": outputs.loss, "logits": outputs.logits, **grads})
    assert_all_no_worse(*found)


# -- the weights of the forward ----------------------------------------------------------------------------------------


def stepped(model: nn.Module, outputs: Any, **options: Any) -> None:
    outputs.loss.backward()
    torch.optim.AdamW(model.parameters(), lr=1e-3, **options).step()


def resized(model: Any, outputs: Any) -> None:
    with torch.no_grad():
        model.lm_head.weight = nn.Parameter(model.lm_head.weight + 1)


CHANGES: dict[str, Callable[[Any, Any], Any]] = {
    "optimizer": stepped,
    "foreach": lambda model, outputs: stepped(model, outputs, foreach=True),
    "fused": lambda model, outputs: stepped(model, outputs, fused=True),  # past the version counter
    "data": lambda model, outputs: model.lm_head.weight.data.mul_(2),
    "cast": lambda model, outputs: model.to(torch.bfloat16),
    "there and back": lambda model, outputs: model.to(torch.bfloat16).to(torch.float32),
    "moved": lambda model, outputs: model.to("meta"),
    "loaded": lambda model, outputs: model.load_state_dict(model.state_dict()),
    "replaced": resized,
}


@pytest.mark.parametrize("change", CHANGES)
def test_other_weights_than_those_of_the_forward(change: str) -> None:
    model = patched()
    outputs = outputs_of(model)
    CHANGES[change](model, outputs)
    for read in (lambda: outputs.logits, lambda: outputs["logits"], outputs.to_tuple):
        with pytest.raises(RuntimeError, match='logits="real"'):
            read()
    model = patched()
    outputs = outputs_of(model)
    before = outputs.logits.clone()
    CHANGES[change](model, outputs)
    assert torch.equal(outputs.logits, before)


@pytest.mark.parametrize("rows", [slice(None), 5])
def test_a_frozen_head_is_written_to(rows: Any) -> None:
    """Past the version counter, as whoever merges adapters or sets averaged weights does it."""
    model = patched()
    model.lm_head.requires_grad_(False)
    outputs = outputs_of(model)
    model.lm_head.weight.data[rows].mul_(2)
    with pytest.raises(RuntimeError, match='logits="real"'):
        outputs["logits"]


def test_what_does_not_change_the_weights() -> None:
    model, expected = patched(), build("llama").train()(**batch()).logits
    outputs = outputs_of(model)
    outputs.loss.backward()
    model.eval()
    model.zero_grad()
    liger_kernel.unpatch(model)
    assert torch.equal(outputs.logits, expected)


# -- torch.compile -----------------------------------------------------------------------------------------------------


@pytest.fixture
def compiled(one_graph: None) -> Any:
    torch._dynamo.reset()
    model = patched()
    return model, torch.compile(model, fullgraph=True, backend="aot_eager")


def test_compiled_training_has_logits(compiled: Any) -> None:
    model, forward = compiled
    for _ in range(2):
        outputs = forward(**batch(), use_cache=False)
        assert fused(outputs)
        assert isinstance(outputs, CausalLMOutputWithPast)
        assert torch.equal(outputs[0], outputs.loss)
        assert fused(outputs)
        with torch.no_grad():
            assert outputs.logits.argmax(-1).shape == (3, 11)
        expected = build("llama").train()(**batch()).logits
        high = build("llama", torch.float64).train()(**batch()).logits
        assert_no_worse("logits", outputs.logits, high, expected)
        assert outputs["logits"] is outputs.logits
        focal(outputs.logits, batch()["labels"]).backward()
        assert model.lm_head.weight.grad.norm() > 0
        assert model.model.norm.weight.grad.norm() > 0
        model.zero_grad()


def test_compiled_logits_after_the_step(compiled: Any) -> None:
    model, forward = compiled
    outputs = forward(**batch(), use_cache=False)
    stepped(model, outputs)
    with pytest.raises(RuntimeError, match='logits="real"'):
        outputs.logits  # noqa: B018


def test_compiled_logits_of_a_frozen_body(compiled: Any) -> None:
    """Its hidden states have no graph: that of the loss tells when the weight has changed."""
    model, forward = compiled
    model.model.requires_grad_(False)
    outputs = forward(**batch(), use_cache=False)
    assert fused(outputs)
    assert torch.equal(outputs.logits, build("llama").train()(**batch()).logits)
    outputs = forward(**batch(), use_cache=False)
    stepped(model, outputs)
    with pytest.raises(RuntimeError, match='logits="real"'):
        outputs.logits  # noqa: B018


def test_compiled_without_gradients(compiled: Any) -> None:
    model, forward = compiled
    with torch.no_grad():
        outputs = forward(**batch(), use_cache=False)
        model.lm_head.weight += 1
    assert torch.equal(outputs.logits, build("llama").train()(**batch()).logits)


def test_exported_with_labels(compiled: Any) -> None:
    model, _ = compiled
    given = {"input_ids": batch()["input_ids"], "labels": batch()["labels"], "use_cache": False}
    theirs = build("llama").train()
    stock_can("export", lambda: torch.export.export(theirs, (), given, strict=False))
    outputs = torch.export.export(model, (), given, strict=False).module()(**given)
    expected = theirs(**given)
    assert torch.equal(outputs.loss, expected.loss)
    assert torch.equal(outputs.logits, expected.logits)


@pytest.mark.usefixtures("one_graph")
@pytest.mark.parametrize("logits", ["none", "real"])
def test_compiled_with_other_options(logits: str) -> None:
    torch._dynamo.reset()
    forward = torch.compile(patched(logits=logits), fullgraph=True, backend="aot_eager")
    outputs = forward(**batch(), use_cache=False)
    assert not fused(outputs)
    if logits == "none":
        assert outputs.logits is None
    else:
        assert outputs.logits.shape == (3, 11, VOCAB)


def test_compiled_evaluation(compiled: Any) -> None:
    model, forward = compiled
    model.eval()
    assert not fused(forward(**batch(), use_cache=False))
    outputs = forward(**batch(), use_cache=False, skip_logits=True)
    assert fused(outputs)
    assert outputs.logits.shape == (3, 11, VOCAB)


@pytest.mark.parametrize("more", [{}, {"labels": None}, {"logits_to_keep": 4}], ids=str)
@pytest.mark.parametrize("training", [False, True])
def test_compiled_without_labels(compiled: Any, training: bool, more: dict[str, Any]) -> None:
    model, forward = compiled
    model.train(training)
    given = {"input_ids": batch()["input_ids"], "use_cache": False, **more}
    outputs, expected = forward(**given), build("llama").train(training)(**given)
    assert outputs.loss is None
    assert torch.equal(outputs.logits, expected.logits)
