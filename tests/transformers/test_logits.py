"""`output.logits` of a patched model: the tensor that the unpatched model would give, whenever it is read."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import pickle
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils.checkpoint import checkpoint
from transformers.modeling_outputs import CausalLMOutputWithPast

import liger_kernel
from liger_kernel.testing import assert_no_worse
from liger_kernel.transformers.patching.deferred import DeferredLogits
from tests.transformers.steps import assert_all_no_worse, fused
from tests.transformers.tiny import VOCAB, batch, build

TYPES = ["llama", "gemma2"]  # as the head gives them, and soft-capped


def patched(model_type: str = "llama", dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    model = build(model_type, dtype)
    assert any(row.kind == "loss" for row in liger_kernel.patch(model, **options).replaced)
    return model.train()


def outputs_of(model: nn.Module, **more: Any) -> Any:
    outputs = model(**batch(), **more)
    assert fused(outputs)
    return outputs


def focal(logits: Tensor, labels: Tensor) -> Tensor:
    loss = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten())
    return (1 - torch.exp(-loss)) ** 2 * loss


def assert_full_gradient(
    use: Callable[[Any], Tensor], model_type: str = "llama", context: Any = contextlib.nullcontext
) -> None:
    """Gradients of `use(outputs)`, of which stock gives the truth."""

    def gradients(model: nn.Module) -> dict[str, Tensor]:
        with context():
            outputs = model.train()(**batch())
        use(outputs).backward()
        return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    ours = gradients(patched(model_type))
    high, low = (gradients(build(model_type, d)) for d in (torch.float64, torch.float32))
    assert_all_no_worse(ours, high, low)


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


USES: dict[str, Callable[[Tensor], Tensor]] = {
    "Function.apply": lambda x: Doubled.apply(x).square(),
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


@pytest.mark.parametrize("function", [Doubled, Exponential], ids=lambda f: f.__name__)
def test_a_function_inside_the_forward(function: Any) -> None:
    """It records tensors alone, so that the loss would have no gradient, or a part of it."""
    model = patched()
    model.loss_function = lambda logits, **others: function.apply(logits).mean()
    with pytest.raises(RuntimeError, match=r"apply.*fused_linear_cross_entropy=False"):
        model(**batch())
    liger_kernel.patch(model, fused_linear_cross_entropy=False)
    model(**batch()).loss.backward()
    assert model.lm_head.weight.grad.norm() > 0


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


def test_what_does_not_change_the_weights() -> None:
    model, expected = patched(), build("llama").train()(**batch()).logits
    outputs = outputs_of(model)
    outputs.loss.backward()
    model.eval()
    model.zero_grad()
    liger_kernel.unpatch(model)
    assert torch.equal(outputs.logits, expected)


# -- the output object -------------------------------------------------------------------------------------------------


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
    import weakref

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


# -- torch.compile -----------------------------------------------------------------------------------------------------


@pytest.fixture
def compiled() -> Any:
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
