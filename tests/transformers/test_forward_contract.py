"""Every way to call the forward of a patched model gives what the unpatched model gives."""

from __future__ import annotations

import collections
import copy
import gc
import inspect
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses import FakeTensor

import liger_kernel
from liger_kernel.testing import assert_no_worse
from tests.transformers.steps import (
    assert_all_no_worse,
    assert_same_step,
    fused,
    step,
    steps,
)
from tests.transformers.tiny import batch, build


@pytest.mark.parametrize("model_type", ["llama", "gemma2"])
class TestForwardContract:
    """Every way to call the forward gives what the unpatched model gives."""

    @pytest.fixture
    def model(self, model_type: str) -> nn.Module:
        model = build(model_type)
        liger_kernel.patch(model)
        return model

    @pytest.mark.parametrize("checkpointing", [{"use_reentrant": True}, {"use_reentrant": False}])
    def test_gradient_checkpointing(
        self, model_type: str, model: nn.Module, checkpointing: dict[str, bool]
    ) -> None:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=checkpointing)
        assert_same_step(model_type, torch.float32, model, **batch(), use_cache=False)

    def test_nothing_waits_for_the_garbage_collector(
        self, model_type: str, model: nn.Module
    ) -> None:
        """A cycle through a deferred value would keep each step's hidden states until Python looks for cycles."""
        model(**batch()).loss.backward()  # imports and caches
        torch._dynamo.reset()
        while gc.collect():  # what other tests compiled goes in several rounds
            pass
        gc.disable()
        try:
            model(**batch()).loss.backward()
            gc.set_debug(gc.DEBUG_SAVEALL)
            gc.collect()
            tensors = [t for t in gc.garbage if isinstance(t, torch.Tensor)]
            held = [tuple(t.shape) for t in tensors if not isinstance(t, FakeTensor)]
        finally:
            gc.set_debug(0)
            gc.garbage.clear()
            gc.enable()
        assert held == []

    def test_shift_labels_alone(self, model_type: str, model: nn.Module) -> None:
        inputs = batch()
        shifted = F.pad(inputs.pop("labels"), (0, 1), value=-100)[:, 1:].contiguous()
        high, _ = step(build(model_type, torch.float64), **batch())
        low, _ = step(build(model_type), **batch())
        for training in (True, False):
            model.train(training)
            loss = model(**inputs, shift_labels=shifted).loss
            assert_no_worse(f"training={training}", loss, high.loss, low.loss)
        both = model(**inputs, labels=shifted, shift_labels=shifted).loss
        assert_no_worse("shift_labels win", both, high.loss, low.loss)

    def test_eval_gives_real_logits(self, model_type: str, model: nn.Module) -> None:
        expected = build(model_type).eval()(**batch())
        ours = model.eval()(**batch())
        assert isinstance(ours.logits, torch.Tensor)
        high = build(model_type, torch.float64).eval()(**batch())
        assert_no_worse("logits", ours.logits, high.logits, expected.logits)
        assert_no_worse("loss", ours.loss, high.loss, expected.loss)

    def test_skip_logits(
        self, model_type: str, model: nn.Module, calls: collections.Counter[str]
    ) -> None:
        expected = build(model_type).eval()(**batch())
        high = build(model_type, torch.float64).eval()(**batch())
        ours = model.eval()(**batch(), skip_logits=True)
        assert fused(ours)
        assert calls["fused_linear_cross_entropy"] + calls["cross_entropy"] >= 1
        assert_no_worse("loss", ours.loss, high.loss, expected.loss)
        calls.clear()
        kept = model.train()(**batch(), skip_logits=False)
        assert isinstance(kept.logits, torch.Tensor)
        assert not calls["fused_linear_cross_entropy"]
        assert not calls["cross_entropy"]
        calls.clear()
        for training in (True, False):  # no labels, no loss that takes the place of the logits
            alone = model.train(training)(input_ids=batch()["input_ids"], skip_logits=True)
            assert alone.loss is None
            assert_no_worse("logits", alone.logits, high.logits, expected.logits)
        assert not calls["fused_linear_cross_entropy"]

    def test_logits_on_demand(self, model_type: str, model: nn.Module) -> None:
        expected = build(model_type).train()(**batch()).logits
        high = build(model_type, torch.float64).train()(**batch()).logits
        outputs = model.train()(**batch())
        assert fused(outputs)
        assert dict(outputs.items())["logits"].shape == expected.shape
        assert_no_worse("logits", outputs.logits, high, expected)
        assert type(outputs.logits) is torch.Tensor
        assert not fused(outputs)

    def test_tuple_output(self, model_type: str, model: nn.Module) -> None:
        expected = build(model_type).train()(**batch(), return_dict=False)
        ours = model.train()(**batch(), return_dict=False)
        assert isinstance(ours, tuple)
        assert len(ours) == len(expected)
        assert ours[1].shape == expected[1].shape

    def test_logits_to_keep(self, model_type: str, model: nn.Module) -> None:
        inputs = batch()
        shifted = F.pad(inputs["labels"], (0, 1), value=-100)[:, 1:][:, -4:].contiguous()
        arguments = {**inputs, "shift_labels": shifted, "logits_to_keep": 4}
        assert_same_step(model_type, torch.float32, model, **arguments)
        assert model.eval()(inputs["input_ids"], logits_to_keep=2).logits.shape[1] == 2

    def test_hidden_states(self, model_type: str, model: nn.Module) -> None:
        expected = build(model_type).train()(**batch(), output_hidden_states=True).hidden_states
        ours = model.train()(**batch(), output_hidden_states=True).hidden_states
        assert [h.shape for h in ours] == [h.shape for h in expected]

    @pytest.mark.parametrize("training", [True, False])
    def test_accuracy_and_predictions(
        self, model_type: str, model: nn.Module, training: bool
    ) -> None:
        inputs = batch()
        logits = build(model_type).train(training)(**inputs).logits[:, :-1]
        labels = inputs["labels"][:, 1:]
        ours = model.train(training)(
            **inputs, return_token_accuracy=True, return_predicted_tokens=True
        )
        hits = (logits.argmax(-1) == labels)[labels != -100].float().mean()
        assert_no_worse("accuracy", ours.token_accuracy, hits.double(), hits)
        predicted = ours.predicted_tokens.view(3, -1)[:, :-1]
        assert torch.equal(predicted[labels != -100], logits.argmax(-1)[labels != -100])
        assert "token_accuracy" in ours
        rebuilt = type(ours)(dict(ours))  # what accelerate does
        assert rebuilt.token_accuracy is ours.token_accuracy
        as_tuple = model(**inputs, return_token_accuracy=True, return_dict=False)
        assert torch.equal(as_tuple[-1], ours.token_accuracy)

    def test_loss_survives_in_place_use(self, model_type: str, model: nn.Module) -> None:
        loss = model.train()(**batch()).loss
        expected = 2 * loss.detach()
        loss *= 2
        loss.backward()
        assert torch.equal(loss.detach(), expected)

    def test_labels_given_by_position(self, model_type: str, model: nn.Module) -> None:
        inputs = batch()
        position = list(inspect.signature(model.forward).parameters).index("labels")
        args = [
            inputs["input_ids"],
            inputs["attention_mask"],
            *[None] * (position - 2),
            inputs["labels"],
        ]
        assert fused(model.train()(*args))

    def test_an_exception_inside_disarms(self, model_type: str, model: nn.Module) -> None:
        with pytest.raises(ValueError, match="input_ids or inputs_embeds"):
            model.train()(labels=batch()["labels"])
        assert isinstance(model.lm_head(torch.randn(1, 2, model.config.hidden_size)), torch.Tensor)

    def test_deepcopy_and_pickle(self, model_type: str, model: nn.Module) -> None:
        twin = copy.deepcopy(model)
        liger_kernel.unpatch(twin)
        assert fused(model.train()(**batch()))
        assert not fused(twin.train()(**batch()))
        again = pickle.loads(pickle.dumps(model))
        ours, loaded = step(model, **batch())[0], step(again, **batch())[0]
        assert torch.equal(ours.loss, loaded.loss)

    def test_autocast(self, model_type: str, model: nn.Module) -> None:
        def autocast() -> Any:
            return torch.autocast("cpu", dtype=torch.bfloat16)

        low = steps(build(model_type), torch.float32, autocast)
        high = steps(build(model_type, torch.float64), torch.float32)
        assert_all_no_worse(steps(model, torch.float32, autocast), high, low)


@pytest.mark.parametrize("model_type", ["llama", "gemma2"])
def test_ignored_labels_cost_nothing(model_type: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The number of labels reaches the loop from the start of the forward, not from a look at the loss's own labels."""
    from liger_kernel.loss_head import loop
    from liger_kernel.loss_head.plan import ChunkOptions

    inputs = batch(ignored=0.8)
    model = build(model_type)
    liger_kernel.patch(model)
    said: list[Any] = []
    run = loop.run

    def listening(*args: Any) -> Any:
        said.append(next(a.label_count for a in args if isinstance(a, ChunkOptions)))
        return run(*args)

    monkeypatch.setattr(loop, "run", listening)
    model(**inputs).loss.backward()
    assert int(said[0]) == int((inputs["labels"] != -100).sum())
    # with two sets of labels nobody knows which one the model's own loss takes
    model(**inputs, shift_labels=inputs["labels"].roll(-1, 1)).loss.backward()
    assert said[1:] == [None]
