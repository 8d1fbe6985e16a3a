"""The output object of a patched model: HF's, whoever reads it, walks over it or copies it."""

from __future__ import annotations

import copy
import dataclasses
import pickle
import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from transformers.modeling_outputs import CausalLMOutputWithPast

import liger_kernel
from liger_kernel.transformers.patching.deferred import DeferredLogits
from tests.transformers.steps import assert_full_gradient, focal, fused, outputs_of, patched
from tests.transformers.tiny import batch, build


@pytest.fixture
def outputs() -> Any:
    return outputs_of(patched())


def test_every_way_to_read(outputs: Any) -> None:
    expected = build("llama").train()(**batch())
    assert isinstance(outputs, CausalLMOutputWithPast)
    assert list(outputs.keys()) == list(expected.keys())
    assert len(outputs) == len(expected)
    assert torch.equal(outputs[0], outputs.loss)
    assert outputs["loss"] is outputs.loss
    assert "logits" in outputs
    assert outputs.get("nothing", 3) == 3
    with pytest.raises(KeyError):
        outputs["nothing"]
    assert fused(outputs), "none of these has to make logits"
    for read in (
        lambda o: o.logits,
        lambda o: o["logits"],
        lambda o: o.get("logits"),
        lambda o: o[1],
        lambda o: o[:2][1],
        lambda o: o.to_tuple()[1],
        lambda o: dict(o)["logits"],
    ):
        fresh = outputs_of(patched())
        logits = read(fresh)
        assert type(logits) is Tensor
        assert torch.equal(logits, expected.logits)
        assert read(fresh) is fresh.logits is logits
        assert not fused(fresh)


def walked(name: str, outputs: Any) -> Any:
    if name == "FSDP1":
        from torch.distributed.utils import _apply_to_tensors

        return _apply_to_tensors(lambda t: t, outputs)
    if name == "DDP":
        from torch.nn.parallel.distributed import _find_tensors

        assert any(t is outputs.loss for t in _find_tensors(outputs))
        return outputs
    if name.startswith("accelerate"):
        from accelerate.utils import operations

        function = getattr(operations, name.split()[1])
        return function(outputs, *(["cpu"] if name.endswith("device") else []))
    if name == "fields":
        values = [getattr(outputs, field.name) for field in dataclasses.fields(outputs)]
        assert sum(type(v) is DeferredLogits for v in values) == 1
        return outputs
    return {
        "pytree": lambda o: pytree.tree_map(lambda t: t, o),
        "replace": dataclasses.replace,
        "rebuilt": lambda o: type(o)({k: v for k, v in o.items()}),  # noqa: C416
        "copy": copy.copy,
        "repr": lambda o: (repr(o), o)[1],
    }[name](outputs)


@pytest.mark.parametrize(
    "name",
    [
        "FSDP1",
        "DDP",
        "accelerate convert_to_fp32",
        "accelerate send_to_device",
        "pytree",
        "fields",
        "replace",
        "rebuilt",
        "copy",
        "repr",
    ],
)
def test_walking_over_it_makes_no_logits(name: str, outputs: Any) -> None:
    again = walked(name, outputs)
    assert fused(outputs)
    assert fused(again)
    assert isinstance(again, CausalLMOutputWithPast)
    assert torch.equal(again.logits, build("llama").train()(**batch()).logits)


def test_outputs_of_autocast_are_converted() -> None:
    from accelerate.utils.operations import convert_to_fp32

    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours, expected = outputs_of(patched()), build("llama").train()(**batch())
    ours, expected = convert_to_fp32(ours), convert_to_fp32(expected)
    assert fused(ours)
    assert ours.logits.dtype == torch.float32
    assert torch.equal(ours.logits, expected.logits)


@torch.no_grad()
def test_copies_are_hf_s() -> None:
    """With real logits, and without a reference to the model."""
    for copied in (copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))):
        outputs = outputs_of(patched(), use_cache=False)
        again = copied(outputs)
        assert type(again) is CausalLMOutputWithPast
        assert torch.equal(again.logits, outputs.logits)


def test_written_to(outputs: Any) -> None:
    outputs.logits = outputs.loss
    assert outputs["logits"] is outputs.loss
    outputs["logits"] = None
    assert outputs.logits is None


def test_hidden_states_are_freed_with_the_output() -> None:
    model = patched()
    outputs = outputs_of(model)
    hidden = weakref.ref(dict(outputs.items())["logits"]._origin.hidden)
    loss = outputs.loss.detach()
    del outputs
    assert hidden() is None
    assert loss.isfinite()


# -- options -----------------------------------------------------------------------------------------------------------


def test_none_and_real() -> None:
    expected = build("llama").train()(**batch())
    none = patched(logits="none")(**batch())
    assert none.logits is None
    assert "logits" not in none
    assert type(none) is CausalLMOutputWithPast
    assert none.to_tuple()[0] is none.loss
    assert torch.equal(none.loss, outputs_of(patched()).loss)
    real = patched(logits="real")(**batch())
    assert type(real) is CausalLMOutputWithPast
    assert torch.equal(real.logits, expected.logits)
    assert torch.equal(real.loss, none.loss)
    assert_full_gradient(lambda o: focal(o.logits, batch()["labels"]) + o.loss)
    for options in ({"logits": None}, {"logits": "no"}, {"logits": True}):
        with pytest.raises(ValueError, match=r"none of 'lazy', 'none', 'real'"):
            liger_kernel.patch(build("llama"), **options)


@pytest.mark.parametrize("logits", ["lazy", "none", "real"])
def test_who_asks_to_skip_them(logits: str) -> None:
    model = patched(logits=logits).eval()
    expected = build("llama").eval()(**batch()).logits
    assert torch.equal(model(**batch()).logits, expected)
    skipped = model(**batch(), skip_logits=True)
    assert fused(skipped) == (logits == "lazy")
    assert skipped.logits is None if logits == "none" else torch.equal(skipped.logits, expected)
    assert torch.equal(model.train()(**batch(), skip_logits=False).logits, expected)


@pytest.mark.parametrize("logits", ["lazy", "none", "real"])
def test_tuples(logits: str) -> None:
    model = patched(logits=logits)
    expected = build("llama").train()(**batch(), return_dict=False)
    ours = model(**batch(), return_dict=False)
    assert type(ours) is tuple
    assert len(ours) == len(expected)
    assert ours[1] is None if logits == "none" else torch.equal(ours[1], expected[1])


def test_a_model_that_needs_logits_has_them() -> None:
    model = patched(logits="none")
    model.loss_function = lambda logits, **others: logits.exp().mean()
    assert model(**batch()).logits is not None


class Pair(NamedTuple):
    loss: Tensor
    logits: Tensor


@dataclasses.dataclass
class Record:
    loss: Tensor
    logits: Tensor


class Bare:
    def __init__(self, loss: Tensor, logits: Tensor):
        self.loss, self.logits = loss, logits


KINDS: dict[str, Callable[[Any], Any]] = {
    "tensor": lambda o: o.logits,
    "loss": lambda o: o.loss,
    "list": lambda o: [o.loss, o.logits],
    "named": lambda o: Pair(o.loss, o.logits),
    "dict": lambda o: {"loss": o.loss, "logits": o.logits},
    "nested": lambda o: {"loss": o.loss, "more": [(o.logits,)]},
    "dataclass": lambda o: Record(o.loss, o.logits),
    "object": lambda o: Bare(o.loss, o.logits),
    "nothing": lambda o: None,
}


def leaves(value: Any) -> list[Any]:
    if isinstance(value, (Record, Bare)):
        value = vars(value)
    return pytree.tree_leaves(value)


@pytest.mark.parametrize("kind", KINDS)
def test_forwards_of_other_types(kind: str) -> None:
    """The type is kept, and no deferred object leaves the forward."""

    def of(model: Any) -> Any:
        class Own(type(model)):  # type: ignore[misc]
            def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> Any:
                return KINDS[kind](super().forward(input_ids=input_ids, labels=labels))

        model.__class__ = Own
        return model.train()

    inputs = {name: batch()[name] for name in ("input_ids", "labels")}
    expected = of(build("llama"))(**inputs)
    model = of(build("llama"))
    liger_kernel.patch(model)
    ours = model(**inputs)
    assert type(ours) is type(expected) or kind in ("dataclass", "object")
    for one, other in zip(leaves(ours), leaves(expected), strict=True):
        assert type(one) is type(other)
        if isinstance(one, Tensor) and one.ndim:
            assert torch.equal(one, other)
