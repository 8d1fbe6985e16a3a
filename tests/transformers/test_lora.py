"""Linears with adapters of PEFT: the numbers are PEFT's in every state of the adapters, or PEFT computes them."""

from __future__ import annotations

import contextlib
import copy
import gc
import pickle
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import liger_kernel
from liger_kernel.ops import lora_linear as op
from liger_kernel.ops import lora_mlp
from liger_kernel.ops.lora_linear import lora_linear
from liger_kernel.testing import assert_draws_no_worse, assert_no_worse
from liger_kernel.transformers.patching import adapters
from tests.transformers.here import stock_can
from tests.transformers.steps import BATCHES, move, unrounded
from tests.transformers.tiny import batch, build

peft = pytest.importorskip("peft")

pytestmark = pytest.mark.usefixtures("quiet_on_one_thread")

LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def adapted(name: str = "llama", dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    """A tiny model whose adapters are no zeros."""
    config = peft.LoraConfig(
        r=4, lora_alpha=8, target_modules=options.pop("target_modules", LINEARS), **options
    )
    model = peft.get_peft_model(build(name).to(dtype), config)
    fill(model)
    return model.train()


def fill(model: nn.Module) -> None:
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_" in name:
                p.copy_(0.2 * torch.randn(p.shape, generator=generator))


Found = dict[str, Tensor]


def step(model: nn.Module, precision: torch.dtype | None = None, seed: int = 0) -> Found:
    """Loss and gradients of one step; dropout draws the same each time."""
    torch.manual_seed(5)
    model.zero_grad(set_to_none=True)
    with unrounded(model), torch.autocast("cpu", precision, enabled=precision is not None):
        loss = model(**batch(seed=seed)).loss
        loss.backward()
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return {"loss": loss.detach(), **grads}


def assert_as_peft(
    make: Callable[[], Any],
    precision: torch.dtype | None = None,
    nodes: int | None = 14,
    change: Callable[[Any], Any] = lambda model: None,
    compiled: Callable[[Any], Any] = lambda model: model,
) -> Any:
    """A step of the patched model is one of PEFT's; `nodes`: how many Linears ours computed."""
    stock, wide, ours = make(), make(), make()
    liger_kernel.patch(ours)
    for model in (stock, wide, ours):
        change(model)
    wide.double()
    originals = [p.detach().to(precision or p.dtype, copy=True) for p in stock.parameters()]
    runs = compiled(ours)

    def draw(seed: int) -> tuple[Found, Found, Found]:
        move([stock, wide, ours], originals, seed // BATCHES)
        with counted() as count:
            found = step(runs, precision, seed % BATCHES)
        assert nodes is None or len(count) == nodes
        named = {name.removeprefix("_orig_mod."): grad for name, grad in found.items()}
        return named, step(wide, seed=seed % BATCHES), step(stock, precision, seed % BATCHES)

    exact = all(t.dtype == torch.float32 for t in originals)
    assert_draws_no_worse(draw, first=1 if exact else BATCHES)
    return ours


@contextlib.contextmanager
def counted() -> Iterator[list[Any]]:
    """An entry for each Linear with adapters that ours compute, also within a block."""
    calls: list[Any] = []
    linear, block = op.adapted, lora_mlp.adapted

    def of_linear(*args: Any) -> Tensor:
        calls.append(args)
        return linear(*args)

    def of_block(*args: Any) -> Tensor:
        calls.extend(layer for layer in args[1:4] if layer is not None and layer.adapters)
        return block(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(op, "adapted", of_linear)
        patch.setattr(lora_mlp, "adapted", of_block)
        yield calls


class TestStates:
    @pytest.mark.parametrize("name", ["llama", "qwen2"])
    def test_a_step(self, name: str) -> None:
        ours = assert_as_peft(lambda: adapted(name))
        report = liger_kernel.patch(ours)
        assert sum(row.kind == "lora" for row in report.replaced) == 14
        liger_kernel.unpatch(ours)
        with counted() as calls:
            step(ours)
        assert not calls

    @pytest.mark.parametrize(
        "options", [{"lora_dropout": 0.3}, {"use_rslora": True}, {"rank_pattern": {"q_proj": 7}}]
    )
    def test_options(self, options: dict[str, Any]) -> None:
        assert_as_peft(lambda: adapted(**options))

    def test_a_dropout_that_writes_over_what_others_read(self) -> None:
        def change(model: Any) -> None:
            for layer in model.model.model.layers:
                layer.self_attn.q_proj.lora_dropout["default"].inplace = True

        assert_as_peft(lambda: adapted(lora_dropout=0.3), nodes=12, change=change)

    def test_adapters_in_fp32_on_a_base_of_16_bits(self) -> None:
        model = adapted(dtype=torch.bfloat16)
        assert {p.dtype for n, p in model.named_parameters() if "lora_" in n} == {torch.float32}
        assert_as_peft(lambda: adapted(dtype=torch.bfloat16))

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_autocast(self, dtype: torch.dtype) -> None:
        assert_as_peft(lambda: adapted(dtype=dtype, lora_dropout=0.2), torch.bfloat16)

    def test_two_adapters_and_set_adapter(self) -> None:
        def make() -> Any:
            model = adapted()
            model.add_adapter("other", peft.LoraConfig(r=3, target_modules=LINEARS))
            fill(model)
            return model

        assert_as_peft(make, change=lambda model: model.set_adapter("other"))
        assert_as_peft(make, change=lambda m: m.base_model.set_adapter(["default", "other"]))

    def test_adapters_that_are_off(self) -> None:
        model = adapted()
        stock = copy.deepcopy(model)
        liger_kernel.patch(model)
        liger_kernel.patch(stock, lora=False)
        with counted() as calls, torch.no_grad():
            with stock.disable_adapter(), model.disable_adapter():
                expected, found = stock(**batch()).loss, model(**batch()).loss
            assert not calls
            assert torch.equal(found, expected)
            stock.merge_adapter()
            model.merge_adapter()
            assert torch.equal(model(**batch()).loss, stock(**batch()).loss)
            assert not calls
            model.unmerge_adapter()
            model(**batch())
            assert len(calls) == 14

    def test_a_base_that_is_trained_too(self) -> None:
        assert_as_peft(adapted, change=lambda model: model.requires_grad_(True))

    def test_checkpointing_and_accumulation(self) -> None:
        def change(model: Any) -> None:
            model.enable_input_require_grads()
            model.gradient_checkpointing_enable({"use_reentrant": False})

        assert_as_peft(adapted, change=change, nodes=None)
        model = adapted()
        liger_kernel.patch(model)
        once = step(model)
        model(**batch()).loss.backward()
        for name, p in model.named_parameters():
            if p.grad is not None:
                assert torch.equal(p.grad, 2 * once[name])

    def test_copies_and_pickles(self) -> None:
        model = adapted()
        liger_kernel.patch(model)
        expected = step(model)
        for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            with counted() as calls:
                found = step(twin)
            assert len(calls) == 14
            assert all(torch.equal(found[n], expected[n]) for n in expected)

    def test_adapters_that_come_after_patching(self) -> None:
        model = build("llama")
        assert not [row for row in liger_kernel.patch(model).rows if row.kind == "lora"]
        model = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=LINEARS))
        report = liger_kernel.patch(model)
        assert sum(row.kind == "lora" for row in report.replaced) == 14
        assert liger_kernel.patch(model) is report

    def test_switched_off(self) -> None:
        report = liger_kernel.patch(adapted(), lora=False)
        assert not [row for row in report.rows if row.kind == "lora"]


class TestEmbedding:
    @pytest.fixture
    def read(self, monkeypatch: pytest.MonkeyPatch) -> list[bool]:
        """Whether ours computed, in each call."""
        calls: list[bool] = []
        original = adapters.LoRAEmbeddingPlan._read

        def recorded(module: nn.Module) -> Any:
            found = original(module)
            calls.append(found is not None)
            return found

        monkeypatch.setattr(adapters.LoRAEmbeddingPlan, "_read", staticmethod(recorded))
        return calls

    def make(self, name: str = "llama", **options: Any) -> Any:
        return adapted(name, target_modules=["embed_tokens", "q_proj"], **options)

    def report(self, model: nn.Module) -> Any:
        rows = liger_kernel.patch(model).rows
        (row,) = (row for row in rows if row.path.endswith("embed_tokens"))
        return row

    def test_a_step(self, read: list[bool]) -> None:
        ours = assert_as_peft(self.make, nodes=2)
        assert self.report(ours).by == "LoRA of an embedding"
        assert read
        assert all(read)

    def test_adapters_wider_than_the_base(self) -> None:
        model = self.make(dtype=torch.bfloat16)
        models = model, copy.deepcopy(model).double(), copy.deepcopy(model)
        liger_kernel.patch(model)
        runs = []
        for one in models:
            layer = one.base_model.model.model.embed_tokens
            y = layer(batch()["input_ids"])
            y.backward(torch.linspace(-1, 1, y.numel()).to(torch.bfloat16).view_as(y).to(y.dtype))
            runs.append({"y": y, **{n: p.grad for n, p in layer.named_parameters() if "lora" in n}})
        for name, found in runs[0].items():
            assert_no_worse(name, found, runs[1][name], runs[2][name])

    def test_left_to_peft(self, read: list[bool]) -> None:
        """An embedding that multiplies its result; an adapter that is no plain LoRA, or off."""
        model = self.make("gemma3_text")
        low, high = copy.deepcopy(model), copy.deepcopy(model).double()
        liger_kernel.patch(model)
        read.clear()  # of the proof
        assert_no_worse("loss", *(step(m)["loss"] for m in (model, high, low)))
        with model.disable_adapter(), torch.no_grad():
            model(**batch())
        knows_of_scales = hasattr(peft.tuners.lora.Embedding, "_get_embed_scale")
        assert read == [not knows_of_scales, False]
        assert "Dora" in self.report(self.make(use_dora=True)).reason


class TestWhatIsLeftToPEFT:
    @pytest.mark.parametrize(
        ("options", "reason"), [({"use_dora": True}, "Dora"), ({"lora_bias": True}, "bias")]
    )
    def test_variants(self, options: dict[str, Any], reason: str) -> None:
        if options.get("use_dora"):
            options["target_modules"] = ["q_proj"]
        ours = assert_as_peft(lambda: adapted(**options), nodes=0)
        rows = [row for row in liger_kernel.patch(ours).rows if row.kind == "lora"]
        assert rows
        assert all(reason in row.reason for row in rows)

    def test_a_variant_that_comes_later(self) -> None:
        def change(model: Any) -> None:
            config = peft.LoraConfig(r=3, use_dora=True, target_modules=["q_proj"])
            model.add_adapter("other", config)
            model.set_adapter("other")
            fill(model)

        assert_as_peft(lambda: adapted(target_modules=["q_proj"]), change=change, nodes=0)

    def test_hooks_on_the_linears(self) -> None:
        model = adapted()
        liger_kernel.patch(model)
        layer = model.base_model.model.model.layers[0].mlp
        seen: list[nn.Module] = []
        for module in (layer.gate_proj.base_layer, layer.down_proj):
            module.register_forward_hook(lambda module, args, output: seen.append(module))
        with counted() as calls:
            step(model)
        assert len(seen) == 2
        assert len(calls) == 13
        assert [isinstance(c, lora_mlp.Layer) for c in calls] == [False] * 10 + [True] * 3

    def test_other_code_of_peft(self, monkeypatch: pytest.MonkeyPatch) -> None:
        model = adapted()
        report = liger_kernel.patch(model)
        layer = type(model.base_model.model.model.layers[0].mlp.gate_proj)
        original = layer.forward
        monkeypatch.setattr(layer, "forward", lambda self, x: 2 * original(self, x))
        assert not [row for row in report.replaced if row.kind == "lora"]
        with counted() as calls:
            step(model)
        assert not calls
        rows = [row for row in liger_kernel.patch(adapted()).rows if row.kind == "lora"]
        assert {row.reason for row in rows} == {"Linear computes something else"}
        monkeypatch.undo()
        adapters.verdict.cache_clear()

    def test_compiled(self) -> None:
        def compiled(model: Any) -> Any:
            torch._dynamo.reset()
            return torch.compile(model, backend="eager", fullgraph=True)

        stock_can("PEFT in one graph", lambda: step(compiled(adapted())))
        assert_as_peft(adapted, compiled=compiled, nodes=0)


class TestGradientOfASharedInput:
    """The Linears that read x add up its gradient; the other readers of x have theirs."""

    @staticmethod
    def loss(function: Any, x: Tensor, *weights: Tensor) -> Tensor:
        w, a, b = weights[:3]
        h = x.sin()
        one = function(h, w, None, a, b, 0.5)
        two = function(h, w.flip(0), None, a.flip(0), b, 2.0)
        return (one.cos() * two).sum() + h.exp().sum()

    @pytest.fixture
    def leaves(self) -> list[Tensor]:
        torch.manual_seed(0)
        shapes = ((7, 6), (6, 6), (2, 6), (6, 2))
        return [torch.randn(s, dtype=torch.float64).requires_grad_() for s in shapes]

    def test_several_backwards(self, leaves: list[Tensor]) -> None:
        expected = torch.autograd.grad(self.loss(op.reference.lora_linear, *leaves), leaves)
        loss = self.loss(lora_linear, *leaves)
        for wanted in (leaves, leaves[2:], leaves[:1], leaves):
            found = torch.autograd.grad(loss, wanted, retain_graph=True)
            for leaf, grad in zip(wanted, found, strict=True):
                theirs = next(e for one, e in zip(leaves, expected, strict=True) if one is leaf)
                assert_no_worse("it", grad, theirs, theirs)

    def test_a_backward_that_fails_leaves_nothing_behind(self, leaves: list[Tensor]) -> None:
        x, w, a, b = leaves
        expected = torch.autograd.grad(self.loss(op.reference.lora_linear, *leaves), x)
        h = x.sin()

        def fail(grad: Tensor) -> None:
            raise ValueError("in the midst of a backward")

        failing = lora_linear(h, w, None, a, b, 0.5)
        second = lora_linear(h, w.flip(0), None, a.flip(0), b, 2.0)
        handle = h.register_hook(fail)
        loss = (failing.cos() * second).sum() + h.exp().sum()
        with pytest.raises(ValueError, match="midst"):
            loss.backward(retain_graph=True)
        handle.remove()
        (found,) = torch.autograd.grad(loss, x)
        assert_no_worse("it", found, expected[0], expected[0])

    def test_an_input_that_changes_between_two_linears(self, leaves: list[Tensor]) -> None:
        x, w, a, b = leaves
        for frozen in (w, a):  # no x is kept then, whose change autograd would refuse
            frozen.requires_grad_(False)

        def changing(function: Any) -> Tensor:
            h = x * 2
            first = function(h, w, None, a, b, 0.5)
            h.mul_(3)
            return (first + function(h, w, None, a, b, 0.5)).sin().sum()

        expected = torch.autograd.grad(changing(op.reference.lora_linear), (x, b))
        found = torch.autograd.grad(changing(lora_linear), (x, b))
        for ours, theirs in zip(found, expected, strict=True):
            assert_no_worse("it", ours, theirs, theirs)

    @pytest.mark.parametrize("leaf", [True, False])
    def test_nothing_is_held(self, leaf: bool) -> None:
        x = torch.randn(7, 6, requires_grad=True)
        x = x if leaf else x * 2
        y = lora_linear(x, torch.randn(6, 6), None, torch.randn(2, 6), torch.randn(6, 2))
        reference = weakref.ref(x)
        del x, y
        gc.collect()
        assert reference() is None

    def test_a_second_derivative_is_refused(self, leaves: list[Tensor]) -> None:
        with pytest.raises(RuntimeError, match="second derivative"):
            torch.autograd.grad(self.loss(lora_linear, *leaves), leaves, create_graph=True)


def test_dtypes_that_do_not_meet_are_an_error_as_with_peft() -> None:
    model = adapted()
    liger_kernel.patch(model)
    layer = model.get_submodule("base_model.model.model.layers.0.self_attn.q_proj").bfloat16()
    with pytest.raises(RuntimeError, match="same dtype"):
        layer(torch.ones(2, 48))


@pytest.mark.parametrize(
    ("change", "error", "told"),
    [
        ({"lora_a": torch.ones(3, 9)}, ValueError, r"lora_a \(3, 9\)"),
        ({"lora_b": torch.ones(12, 2)}, ValueError, r"lora_b \(12, 2\)"),
        ({"bias": torch.ones(11)}, ValueError, r"bias \(11,\)"),
        ({"x": torch.ones(5, 8).bfloat16()}, TypeError, "torch.autocast"),
        ({"lora_a": torch.ones(3, 8).bfloat16()}, TypeError, "bfloat16"),
        ({"weight": torch.ones(12, 8).long()}, TypeError, "weight"),
    ],
)
def test_what_does_not_fit(change: dict[str, Tensor], error: type[Exception], told: str) -> None:
    given: dict[str, Any] = {
        "x": torch.ones(5, 8),
        "weight": torch.ones(12, 8),
        "bias": torch.ones(12),
        "lora_a": torch.ones(3, 8),
        "lora_b": torch.ones(12, 3),
    }
    lora_linear(**given)
    with pytest.raises(error, match=told):
        lora_linear(**(given | change))
