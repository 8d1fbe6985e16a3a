"""A patched model where autograd's reach ends for kernels: without numbers, traced, and transformed by torch.func."""

from __future__ import annotations

import collections
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call, grad, jvp, vmap

import liger_kernel
from liger_kernel.testing import assert_draws_no_worse
from tests.transformers.here import stock_can
from tests.transformers.steps import unrounded
from tests.transformers.tiny import batch, build

pytestmark = pytest.mark.usefixtures("quiet_on_one_thread")
FAMILIES = ["gemma2", "llama", "qwen3"]
families = pytest.mark.parametrize("model_type", FAMILIES)


def check_step(model: nn.Module, inputs: dict[str, Tensor]) -> None:
    rows, length = inputs["input_ids"].shape
    loss = model.train()(**inputs).loss
    assert (loss.shape, loss.dtype) == ((), torch.float32)
    loss.backward()
    for p in model.parameters():
        assert p.grad is not None
        assert (p.grad.shape, p.grad.dtype, p.grad.device) == (p.shape, p.dtype, p.device)
    with torch.no_grad():
        logits = model.eval()(input_ids=inputs["input_ids"]).logits
    assert logits.shape == (rows, length, model.config.vocab_size)


@families
def test_meta_tensors(model_type: str) -> None:
    """A model that was moved there, and one that was made there."""
    moved = build(model_type, torch.bfloat16)
    liger_kernel.patch(moved)
    inputs = {name: t.to("meta") for name, t in batch().items() if name != "attention_mask"}
    stock_can("meta tensors", lambda: build(model_type, torch.bfloat16).to("meta")(**inputs))
    with torch.device("meta"):
        made = type(moved)(moved.config).to(torch.bfloat16)
    report = liger_kernel.patch(made)
    assert not report.skipped
    assert report.savings(64, 4096) > 0
    for model in (moved.to("meta"), made):
        check_step(model, inputs)


@families
def test_fake_tensors(model_type: str) -> None:
    """As memory estimators run a model: nothing is computed, shapes and dtypes are."""
    real = build(model_type)
    inputs = {name: t for name, t in batch().items() if name != "attention_mask"}
    with FakeTensorMode() as mode:
        model = type(real)(real.config)
        assert not liger_kernel.patch(model).skipped
        check_step(model, {name: mode.from_tensor(t) for name, t in inputs.items()})


def test_fake_tensors_of_real_ones() -> None:
    """A model that is there, estimated as it is: labels have numbers, and what is made of them has none."""
    model: Any = build("llama")
    liger_kernel.patch(model)
    with FakeTensorMode(allow_non_fake_inputs=True):
        found = model.train()(**batch())
        found.loss.backward()
        assert found.logits.shape == (3, 11, 131)


class Called(nn.Module):
    """What torch.jit.trace takes: tensors in and out."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> tuple[Tensor, ...]:
        found = self.model(input_ids=input_ids, labels=labels, use_cache=False)
        if self.training:
            return (found.loss,)
        return (found.logits,) if labels is None else (found.loss, found.logits)


@pytest.mark.parametrize("state", ["eval", "eval with labels", "train with labels"])
@families
def test_jit_trace(model_type: str, state: str) -> None:
    """The trace is made of PyTorch's own ops: it is saved, loaded, and right for other tokens."""
    (ids, labels), (other, other_labels) = (
        (found["input_ids"], found["labels"]) for found in (batch(seed=0), batch(seed=1))
    )
    stock, patched = (Called(build(model_type)).train("train" in state) for _ in range(2))
    liger_kernel.patch(patched.model)
    with_labels = "labels" in state
    given = (ids, labels) if with_labels else (ids,)
    stock_can("trace", lambda: torch.jit.trace(stock, given))
    traced = torch.jit.trace(patched, given)
    file = io.BytesIO()
    torch.jit.save(traced, file)
    file.seek(0)
    given = (other, other_labels) if with_labels else (other,)
    found = torch.jit.load(file)(*given)
    torch.testing.assert_close(found, stock(*given))


def of_one(model: nn.Module) -> tuple[Callable[..., Tensor], dict[str, Tensor]]:
    """The loss of one sequence as a function of the parameters, and these."""

    def loss(parameters: dict[str, Tensor], ids: Tensor, labels: Tensor) -> Tensor:
        inputs = {"input_ids": ids[None], "labels": labels[None], "use_cache": False}
        found: Tensor = functional_call(model, parameters, (), inputs).loss
        return found

    return loss, {name: p.detach() for name, p in model.named_parameters()}


def gradients_of_each(model: nn.Module, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    loss, parameters = of_one(model)
    per_sequence = vmap(grad(loss), in_dims=(None, 0, 0))
    with unrounded(model):
        found: dict[str, Tensor] = per_sequence(parameters, inputs["input_ids"], inputs["labels"])
    return found


def slope(model: nn.Module, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    loss, parameters = of_one(model)
    ids, labels = inputs["input_ids"][0], inputs["labels"][0]
    with unrounded(model):
        value, found = jvp(lambda p: loss(p, ids, labels), (parameters,), (parameters,))
    return {"loss": value, "slope": found}


@pytest.mark.parametrize("transformed", [gradients_of_each, slope])
@pytest.mark.parametrize("training", [False, True])
@families
def test_torch_func(model_type: str, training: bool, transformed: Any) -> None:
    """Per-sequence gradients, and derivatives in forward mode, as those of the stock model."""
    models = [build(model_type, dtype) for dtype in (torch.float32, torch.float64, torch.float32)]
    liger_kernel.patch(models[0])
    for model in models:
        model.train(training)

    assert_draws_no_worse(lambda seed: [transformed(m, batch(seed=seed)) for m in models])


def test_kernels_compute_again_after_a_transform(calls: collections.Counter[str]) -> None:
    model = build("llama").train()
    liger_kernel.patch(model)
    calls.clear()
    gradients_of_each(model, batch())
    assert not calls
    model(**batch())
    assert calls["rms_norm"]
    assert calls["cross_entropy"]


def test_options_of_a_call_hold_under_torch_func() -> None:
    model = build("llama").train()
    liger_kernel.patch(model)
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    inputs = {**batch(), "use_cache": False, "return_token_accuracy": True}

    def loss(p: dict[str, Tensor]) -> Any:
        found = functional_call(model, p, (), inputs)
        return found.loss, (found.token_accuracy, found.logits)

    (accuracy, logits), value = grad(loss, has_aux=True)(parameters)[1], model(**inputs)
    torch.testing.assert_close(accuracy, value.token_accuracy)
    torch.testing.assert_close(logits, value.logits)
