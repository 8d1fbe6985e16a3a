"""What lies around a head, and who has to see its logits: hooks, wrappers, other weights, another head."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune
from transformers import LlamaConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

import liger_kernel
from liger_kernel.testing import assert_no_worse
from liger_kernel.transformers.patching.state import state_of
from tests.transformers.steps import assert_identical, assert_same_steps, fused, snapshot, step
from tests.transformers.tiny import batch, build

Setup = Callable[[Any], Any]


def halved(module: nn.Module, args: Any, output: Any = None) -> Any:
    """A hook of any kind: halves the output, the inputs, or the gradients of either."""
    if isinstance(output, Tensor):
        return output / 2
    return tuple(value / 2 for value in args)


def halved_inputs(module: nn.Module, args: Any, kwargs: Any) -> Any:
    return tuple(x / 2 for x in args), kwargs


def seen(module: nn.Module, args: Any, output: Tensor) -> None:
    assert output.shape[-1] == module.out_features


class Half(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight / 2


class Subclass(torch.Tensor):
    """A stand-in for torchao's."""


def replaced_forward(model: Any) -> None:
    original = model.lm_head.forward
    model.lm_head.forward = lambda x: original(x) / 2


def on_all_modules(model: Any) -> Any:
    def hook(module: nn.Module, args: Any, output: Any) -> Any:
        return output / 2 if module is model.lm_head else None

    return nn.modules.module.register_module_forward_hook(hook)


#: what somebody does to the head -> what the report says of it
FOREIGN: dict[str, tuple[Setup, str]] = {
    "forward": (lambda m: m.lm_head.register_forward_hook(halved), "a hook of"),
    "sees": (lambda m: m.lm_head.register_forward_hook(seen), "a hook of"),
    "always": (lambda m: m.lm_head.register_forward_hook(halved, always_call=True), "a hook of"),
    "kwargs": (
        lambda m: m.lm_head.register_forward_pre_hook(halved_inputs, with_kwargs=True),
        "a hook of",
    ),
    "pre": (lambda m: m.lm_head.register_forward_pre_hook(halved), "a hook of"),
    "backward": (lambda m: m.lm_head.register_full_backward_hook(halved), "a hook of"),
    "pre-backward": (lambda m: m.lm_head.register_full_backward_pre_hook(halved), "a hook of"),
    "all modules": (on_all_modules, "on all modules"),
    "forward replaced": (replaced_forward, "replaced by someone else"),
    "parametrised": (
        lambda m: parametrize.register_parametrization(m.lm_head, "weight", Half()),
        "parametrised",
    ),
    "weight norm": (
        lambda m: nn.utils.parametrizations.weight_norm(m.lm_head),
        "parametrised",
    ),
    "pruned": (lambda m: prune.random_unstructured(m.lm_head, "weight", 0.5), "prune"),
}


def set_up(name: str, dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
    model = build("llama", dtype)
    torch.manual_seed(0)
    return model, FOREIGN[name][0](model)


def loss_row(model: nn.Module) -> Any:
    (row,) = (row for row in state_of(model).report.rows if row.kind == "loss")
    return row


@pytest.fixture
def model() -> Any:
    model = build("llama")
    liger_kernel.patch(model)
    return model.train()


class TestForeign:
    @pytest.mark.parametrize("first", ["patched", "changed"])
    @pytest.mark.parametrize("name", FOREIGN)
    def test_sees_real_logits(self, name: str, first: str) -> None:
        """The numbers of stock, and a row that says why; where the hook goes, fusion comes back."""
        high, low = (set_up(name, dtype) for dtype in (torch.float64, torch.float32))
        if first == "changed":
            ours, handle = set_up(name)
            report = liger_kernel.patch(ours, chunk_size=8)
        else:
            ours = build("llama")
            report = liger_kernel.patch(ours, chunk_size=8)
            torch.manual_seed(0)
            handle = FOREIGN[name][0](ours)
        try:
            (row,) = (row for row in report.skipped if row.kind == "loss")
            assert row.path == "lm_head"
            assert FOREIGN[name][1] in row.reason
            assert report.savings(4, 16) == 0
            assert FOREIGN[name][1] in str(report)
            assert not fused(ours.train()(**batch()))
            assert_same_steps((ours, high[0], low[0]), [batch()])
        finally:
            for one in (handle, high[1], low[1]):
                if hasattr(one, "remove"):
                    one.remove()
        if hasattr(handle, "remove"):
            assert not report.skipped
            assert report.savings(4, 16) > 0
            assert fused(ours(**batch()))

    @pytest.mark.parametrize("name", FOREIGN)
    def test_unpatch_leaves_it(self, name: str) -> None:
        model = build("llama")
        liger_kernel.patch(model)
        torch.manual_seed(0)
        handle = FOREIGN[name][0](model)
        liger_kernel.unpatch(model)
        expected, other = set_up(name)
        try:
            assert torch.equal(step(model, **batch())[0].loss, step(expected, **batch())[0].loss)
            assert "Liger" not in str(model)
        finally:
            for one in (handle, other):
                if hasattr(one, "remove"):
                    one.remove()

    @pytest.mark.usefixtures("one_graph")
    def test_compiled_with_a_hook_and_without(self, model: Any) -> None:
        torch._dynamo.reset()
        forward = torch.compile(model, fullgraph=True, backend="aot_eager")
        handle = model.lm_head.register_forward_hook(halved)
        stock = build("llama").train()
        stock.lm_head.register_forward_hook(halved)
        expected, high = stock(**batch()).loss, stock.double()(**batch()).loss
        outputs = forward(**batch(), use_cache=False)
        assert not fused(outputs)
        assert_no_worse("loss", outputs.loss, high, expected)
        handle.remove()
        assert fused(forward(**batch(), use_cache=False))

    @pytest.mark.parametrize(
        ("owner", "name", "reason"),
        [
            (nn.Linear, "forward", "does not compute a plain linear map"),
            (F, "linear", "has replaced torch.nn.functional.linear"),
            (F, "cross_entropy", "has replaced torch.nn.functional.cross_entropy"),
        ],
        ids=["Linear", "linear", "cross_entropy"],
    )
    def test_functions_of_torch_that_somebody_replaced(
        self, owner: Any, name: str, reason: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Once is not twice, and not never: also in MLPs, whose Linears are one op otherwise."""
        model, original = build("mistral"), getattr(owner, name)
        report = liger_kernel.patch(model)
        monkeypatch.setattr(owner, name, lambda *args, **kwargs: original(*args, **kwargs) * 1.5)
        assert reason in next(row.reason for row in report.rows if row.kind == "loss")
        low, high = build("mistral"), build("mistral", torch.float64)
        assert_same_steps((model, high, low), [batch()])
        monkeypatch.undo()
        assert fused(model.train()(**batch()))

    def test_a_weight_that_is_no_plain_tensor(self, model: Any) -> None:
        weight = model.lm_head.weight.detach().as_subclass(Subclass)
        model.lm_head.weight = nn.Parameter(weight)
        assert loss_row(model).reason == "its weight is a Subclass"
        assert not fused(model(**batch()))

    @pytest.mark.parametrize(
        "home", ["torch.distributed.tensor.parallel.style", "transformers.integrations.tp", "mine"]
    )
    def test_tensor_parallel_hooks_are_foreign(self, model: Any, home: str) -> None:
        def hook(module: nn.Module, args: Any, output: Tensor) -> Tensor:
            return output

        hook.__module__ = home
        model.lm_head.register_forward_hook(hook)
        assert loss_row(model).reason == f"a hook of {home} has to see its logits"
        assert not fused(model(**batch()))

    @pytest.mark.parametrize(
        "home",
        ["torch.distributed.fsdp._fully_shard", "deepspeed.runtime.zero", "accelerate.hooks"],
    )
    def test_friends_fire_once(self, model: Any, home: str) -> None:
        """Beneath a partial and a decorator, too."""
        import functools

        fired = []

        def hook(what: str, module: nn.Module, args: Any, *output: Any) -> None:
            fired.append(what)

        hook.__module__ = home

        @functools.wraps(hook)
        def wrapper(*args: Any) -> None:
            hook(*args)

        model.lm_head.register_forward_pre_hook(functools.partial(wrapper, "before"))
        model.lm_head.register_forward_hook(functools.partial(wrapper, "after"))
        outputs = model(**batch())
        assert fused(outputs)
        assert fired == ["before", "after"]
        outputs.loss.backward()
        assert outputs.logits.shape[:2] == (3, 11)
        assert fired == ["before", "after"] * 2

    def test_a_dtensor_inside_of_the_call_makes_real_logits(self, model: Any) -> None:
        """As where FSDP2 gathers what tensor parallelism has sharded."""

        def before(module: nn.Module, args: Any) -> None:
            weight = module._parameters["weight"]
            module._parameters["weight"] = nn.Parameter(weight.detach().as_subclass(Subclass))
            kept.append(weight)

        def after(module: nn.Module, args: Any, output: Any) -> None:
            module._parameters["weight"] = kept.pop()

        kept: list[Any] = []
        for hook in (before, after):
            hook.__module__ = "torch.distributed.fsdp._fully_shard"
        model.lm_head.register_forward_pre_hook(before)
        model.lm_head.register_forward_hook(after)
        expected = build("llama").train()(**batch()).loss
        outputs = model(**batch())
        assert torch.equal(outputs.loss, expected)
        assert "Subclass inside of its own call" in loss_row(model).reason


class TestAnotherHead:
    @pytest.mark.parametrize("tied", [False, True])
    def test_resized_embeddings(self, model: Any, tied: bool) -> None:
        model = build("llama", tie_word_embeddings=tied).train()
        report = liger_kernel.patch(model)
        torch.manual_seed(0)
        model.resize_token_embeddings(160, mean_resizing=False)
        stock = build("llama", tie_word_embeddings=tied).train()
        torch.manual_seed(0)
        stock.resize_token_embeddings(160, mean_resizing=False)
        assert not report.skipped
        assert fused(model(**batch()))
        assert_same_steps((model, copy.deepcopy(stock).double(), stock), [batch()])
        assert liger_kernel.patch(model) is report
        liger_kernel.unpatch(model)
        assert type(model.lm_head) is nn.Linear
        assert_identical(
            {k: v for k, v in vars(stock).items() if k == "forward"},
            {k: v for k, v in vars(model).items() if k == "forward"},
        )

    @pytest.mark.usefixtures("one_graph")
    def test_compiled_before_it_was_seen(self, model: Any) -> None:
        """Compiled code changes no classes, so the report says what to do."""
        torch._dynamo.reset()
        report = state_of(model).report
        model.resize_token_embeddings(160, mean_resizing=False)
        forward = torch.compile(model, fullgraph=True, backend="aot_eager")
        assert not fused(forward(**batch(), use_cache=False))
        assert "call patch(model) again" in loss_row(model).reason
        assert liger_kernel.patch(model) is report
        assert fused(forward(**batch(), use_cache=False))
        assert not report.skipped

    def test_an_unsuitable_one_and_back(self, model: Any) -> None:
        head = model.lm_head
        model.lm_head = nn.Sequential(head)
        assert "does not compute a plain linear map" in loss_row(model).reason
        assert not fused(model(**batch()))
        assert state_of(model).report.savings(4, 16) == 0
        model.lm_head = head
        assert loss_row(model).by
        assert fused(model(**batch()))

    def test_none_at_all(self, model: Any) -> None:
        del model.lm_head
        assert loss_row(model).reason == "it is not there any more"

    def test_a_forward_that_does_not_call_it(self) -> None:
        """Here it multiplies by the weight itself."""
        model = build("llama").train()

        class Own(type(model)):  # type: ignore[misc]
            def forward(self, input_ids: Tensor, labels: Tensor) -> Any:
                hidden = self.model(input_ids=input_ids)[0]
                logits = nn.functional.linear(hidden, self.lm_head.weight)
                return self.loss_function(logits, labels, self.config.vocab_size), logits

        model.__class__ = Own
        report = liger_kernel.patch(model)
        model(batch()["input_ids"], labels=batch()["labels"])
        assert [row.reason for row in report.skipped] == [
            "its forward computes a loss without calling it"
        ]


def around_twice(model: Any) -> None:
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    model.lm_head = checkpoint_wrapper(model.lm_head)


#: a wrapper, and what it adds to the names of parameters
WRAPPERS = {
    "checkpoint": "_checkpoint_wrapped_module.",
    "compiled": "_orig_mod.",
    "compiled in place": "",
}


class TestWrappers:
    @pytest.mark.parametrize("first", ["patched", "wrapped"])
    @pytest.mark.parametrize("name", WRAPPERS)
    def test_around_the_head(self, name: str, first: str) -> None:
        torch._dynamo.reset()

        def wrap(model: Any) -> None:
            if name == "checkpoint":
                around_twice(model)
            elif name == "compiled":
                model.lm_head = torch.compile(model.lm_head, backend="eager")
            else:
                model.lm_head.compile(backend="eager")

        model = build("llama").train()
        before = snapshot(model)
        if first == "wrapped":
            wrap(model)
        report = liger_kernel.patch(model)
        if first == "patched":
            wrap(model)
        assert not report.skipped
        outputs = model(**batch())
        assert fused(outputs)
        stock = build("llama").train()
        assert torch.equal(outputs.logits, stock(**batch()).logits)
        models = model, build("llama", torch.float64), build("llama")
        assert_same_steps(models, [batch()], rename=WRAPPERS[name])
        liger_kernel.unpatch(model)
        assert not any(k.startswith("Liger") for k in str(model).split())
        assert {k for k, _ in before} <= {path for path, _ in snapshot(model)} | {"lm_head"}
        assert not fused(model(**batch()))

    def test_copies(self) -> None:
        peft = pytest.importorskip("peft")
        config = peft.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"])
        model = peft.get_peft_model(build("llama"), config).train()
        liger_kernel.patch(model)
        expected = model(**batch())
        assert fused(expected)
        for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            outputs = twin(**batch())
            assert fused(outputs)
            outputs.loss.backward()
            assert twin.get_base_model().lm_head.modules_to_save.default.weight.grad is not None
            liger_kernel.unpatch(twin)
            assert "Liger" not in str(twin)
        assert model.get_base_model().lm_head.modules_to_save.default.weight.grad is None
        with model.disable_adapter():
            outputs = model(**batch())
            assert fused(outputs)
            assert torch.equal(outputs.logits, build("llama").train()(**batch()).logits)


class Block(nn.Module):
    def __init__(self, hidden: int, inner: int):
        super().__init__()
        self.norm = nn.LayerNorm(hidden)
        self.gate_proj = nn.Linear(hidden, inner, bias=False)
        self.up_proj = nn.Linear(hidden, inner, bias=False)
        self.down_proj = nn.Linear(inner, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        return x + self.down_proj(nn.functional.silu(self.gate_proj(y)) * self.up_proj(y))


class Headless(PreTrainedModel):
    """A model of somebody's own, without an output embedding; the head has the name that it is given."""

    config_class = LlamaConfig

    def __init__(self, head: str, layers: int | None, config: LlamaConfig):
        super().__init__(config)
        size, self.head = config.hidden_size, head
        self.embed = nn.Embedding(config.vocab_size, size)
        block = Block(size, config.intermediate_size)
        self.body = block if layers is None else nn.Sequential(*[block] * layers)
        setattr(self, head, nn.Linear(size, config.vocab_size, bias=False))

    def get_output_embeddings(self) -> None:
        return None

    def forward(self, input_ids: Tensor, labels: Tensor | None = None, **kwargs: Any) -> Any:
        logits = getattr(self, self.head)(self.body(self.embed(input_ids)))
        loss = self.loss_function(logits, labels, self.config.vocab_size)
        return CausalLMOutputWithPast(loss=loss, logits=logits)


@pytest.mark.parametrize("layers", [None, 2])
@pytest.mark.parametrize(
    ("head", "sure"), [("lm_head", True), ("output", True), ("to_logits", True), ("proj", False)]
)
def test_a_linear_as_wide_as_the_vocabulary_is_not_always_a_head(
    head: str, sure: bool, layers: int | None
) -> None:
    config = LlamaConfig(
        vocab_size=131, hidden_size=48, intermediate_size=131, num_attention_heads=4
    )

    def make(dtype: torch.dtype) -> Any:
        torch.manual_seed(0)
        return Headless(head, layers, config).to(dtype)

    model = make(torch.float32)
    report = liger_kernel.patch(model)
    rows = [row for row in report.rows if row.kind == "loss"]
    assert [(row.path, row.by is not None) for row in rows] == [
        (head, True) if sure else ("Headless", False)
    ]
    inputs = {k: v for k, v in batch().items() if k != "attention_mask"}
    assert fused(model.train()(**inputs)) == sure
    assert_same_steps((model, make(torch.float64), make(torch.float32)), [inputs])
    liger_kernel.unpatch(model)


@pytest.fixture(autouse=True)
def no_hooks_left() -> Iterator[None]:
    yield
    assert not nn.modules.module._global_forward_hooks
