"""Options for long sequences: MLPs in tiles of tokens, and checkpoints that go to the host."""

from __future__ import annotations

import collections
import contextlib
import copy
import weakref
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import liger_kernel
from liger_kernel.ops import tiled_mlp as tiled_op
from liger_kernel.testing import assert_draws_no_worse, assert_no_worse
from liger_kernel.transformers.patching.sites import checkpoints, mlps
from tests.transformers.steps import BATCHES, move, named_step
from tests.transformers.tiny import batch, build

pytestmark = pytest.mark.usefixtures("quiet_on_one_thread")
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
Found = dict[str, Tensor]


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """33 tokens are five tiles, the last one shorter."""
    monkeypatch.setattr(tiled_op, "_tile_bytes", lambda device: 2**12)
    monkeypatch.setattr(tiled_op, "_MIN_ROWS", 6)


@pytest.fixture
def blocks(monkeypatch: pytest.MonkeyPatch) -> Iterator[collections.Counter[str]]:
    """How many tiles ran forward."""
    counts: collections.Counter[str] = collections.Counter()
    for cls in (tiled_op._Gated, mlps.Rerun):

        def counting(self: Any, *args: Any, original: Any = cls.forward) -> Tensor:
            counts[type(self).__name__] += 1
            return original(self, *args)

        monkeypatch.setattr(cls, "forward", counting)
    return counts


def adapted(
    name: str = "llama", dtype: torch.dtype = torch.float32, rest: Any = None, **options: Any
) -> Any:
    peft = pytest.importorskip("peft")
    options = {"r": 4, "lora_alpha": 8, "target_modules": LINEARS, **options}
    model = peft.get_peft_model(build(name, dtype, **(rest or {})), peft.LoraConfig(**options))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for path, p in model.named_parameters():
            if "lora_" in path:
                p.copy_(0.2 * torch.randn(p.shape, generator=generator))
    return model


def checkpointed(model: Any, reentrant: bool) -> Any:
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    return model


def assert_as_stock(make: Any, ours: nn.Module, precision: torch.dtype | None = None) -> None:
    models = [ours.train(), make().double().train(), make().train()]
    sixteen = precision or next(ours.parameters()).dtype
    originals = [p.detach().to(precision or p.dtype, copy=True) for p in models[-1].parameters()]
    count = 1 if sixteen == torch.float32 else BATCHES

    def draw(seed: int) -> list[Found]:
        move(models, originals, seed // count)
        with torch.autocast("cpu", precision, enabled=precision is not None):
            return [named_step(model, batch(seed=seed % count)) for model in models]

    assert_draws_no_worse(draw, first=count, last=256)


MODELS = {
    "whole": (build, "_Gated", {"mlp_bias": False}),
    "biases": (build, "Rerun", {}),
    "adapters": (adapted, "Rerun", {}),
    "some adapters": (adapted, "Rerun", {"target_modules": ["up_proj", "q_proj"]}),
    "no adapter there": (adapted, "_Gated", {"target_modules": ["q_proj"], "rest": {"mlp_bias": False}}),
    "frozen": (lambda name: build(name, mlp_bias=False).requires_grad_(False), "_Gated", {}),
}  # fmt: skip


@pytest.mark.parametrize("how", [k for k in MODELS if k != "frozen"])
@pytest.mark.parametrize("checkpointing", [None, False, True])
def test_a_step(how: str, checkpointing: bool | None, blocks: collections.Counter[str]) -> None:
    """The numbers of stock; and a checkpointed layer that is computed again stops before its tiles."""
    maker, block, options = MODELS[how]
    make = partial(maker, "llama", **options)
    model = make()
    report = liger_kernel.patch(model, long_context=True)
    assert sum(row.by == "LigerSwiGLU(tiled)" for row in report.replaced) == 2
    if checkpointing is not None:
        checkpointed(model, checkpointing)
    assert_as_stock(make, model)
    blocks.clear()
    named_step(model, batch())
    assert blocks == {block: (20 if checkpointing else 10)}


def test_a_gate_that_holds_both(blocks: collections.Counter[str]) -> None:
    model = build("phi3")
    liger_kernel.patch(model, tiled_mlp=True)
    assert_as_stock(partial(build, "phi3"), model)
    assert blocks["_Gated"]


OTHERWISE = {
    "dropout": ({"lora_dropout": 0.3}, None),
    "autocast": ({}, torch.bfloat16),
    "fp32 adapters on a base of 16 bits": ({"dtype": torch.bfloat16}, None),
}


@pytest.mark.parametrize("how", OTHERWISE)
@pytest.mark.parametrize("checkpointing", [None, False, True])
def test_tiles_are_computed_again_as_they_were(
    how: str, checkpointing: bool | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As PyTorch's own checkpointing of each tile does it: with the same dropout and autocast."""
    options, precision = OTHERWISE[how]
    steps = []
    for alone in (True, False):
        model = adapted(**options)
        liger_kernel.patch(model, long_context=True)
        if checkpointing is not None:
            checkpointed(model, checkpointing)
        monkeypatch.setattr(mlps, "_may_run_alone", lambda module, alone=alone: alone)
        torch.manual_seed(0)
        with torch.autocast("cpu", precision, enabled=precision is not None):
            steps.append(named_step(model, batch(1, 33)))
    for name, value in steps[0].items():
        assert torch.equal(value, steps[1][name]), name


class TestWhoIsWatched:
    """Hooks on parameters run once, those on Linears see their tiles, and shards are left to autograd."""

    def test_hooks_on_parameters(self) -> None:
        def make() -> nn.Module:
            model = build("llama")
            weight = model.model.layers[0].mlp.up_proj.weight
            weight.register_hook(lambda grad: 2 * grad)
            return model

        model = make()
        liger_kernel.patch(model, tiled_mlp=True)
        assert_as_stock(make, model)

    def test_hooks_on_linears(self, blocks: collections.Counter[str]) -> None:
        model = build("llama")
        liger_kernel.patch(model, tiled_mlp=True)
        seen = []
        model.model.layers[0].mlp.up_proj.register_full_backward_hook(
            lambda module, into, out: seen.append(out[0].shape)
        )
        assert_as_stock(partial(build, "llama"), model)
        blocks.clear()
        seen.clear()
        named_step(model, batch())
        assert len(seen) == 4  # tiles of each sequence of 11 tokens
        assert blocks == {"Rerun": 5}


def test_several_backwards_and_accumulation() -> None:
    model = adapted()
    liger_kernel.patch(model, tiled_mlp=True)
    model.train()
    once = named_step(model, batch())
    loss = model(**batch()).loss
    loss.backward(retain_graph=True)
    loss.backward()
    for name, value in once.items():
        if name != "loss":
            assert torch.equal(model.get_parameter(name).grad, 3 * value), name


def test_generation_and_evaluation_are_tiled(blocks: collections.Counter[str]) -> None:
    model, wide = build("llama").eval(), build("llama", torch.float64).eval()
    with torch.no_grad():
        low, high = model(**batch()).logits, wide(**batch()).logits
        liger_kernel.patch(model, tiled_mlp=True)
        assert_no_worse("logits", model(**batch()).logits, high, low)
    assert blocks["Rerun"] == 10


def test_off_by_default_and_off_in_parts() -> None:
    model = build("llama")
    report = liger_kernel.patch(model)
    assert not any("tiled" in str(row.by) or row.kind == "checkpoints" for row in report.rows)
    report = liger_kernel.patch(model, long_context=True, mlp=False)
    assert not any(row.kind == "mlp" for row in report.rows)
    report = liger_kernel.patch(model, offload_checkpoints=True)
    assert [row.path for row in report.replaced if row.kind == "checkpoints"] == ["model"]
    assert not any("tiled" in str(row.by) for row in report.rows)


# -- checkpoints on the host ------------------------------------------------------------


class Streams:
    """A device whose copies happen when somebody waits for them, and not before."""

    def __init__(self) -> None:
        self.events = 0

    @contextlib.contextmanager
    def stream(self, stream: Any) -> Iterator[None]:
        yield

    def current_stream(self, device: Any) -> Any:
        return self

    def wait_event(self, event: Any) -> None:
        self.events += 1
        event()


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch) -> Iterator[collections.Counter[str]]:
    """Checkpoints of this machine go to "the host", late."""
    counts: collections.Counter[str] = collections.Counter()
    streams = Streams()

    def beside(device: Any, pairs: list[tuple[Tensor, Tensor]]) -> Any:
        todo = [pairs]
        to_host = hasattr(pairs[0][0], "on_host")

        def wait() -> None:
            while todo:
                for to, of in todo.pop():
                    with torch.no_grad():
                        to.copy_(of)

        counts["to host" if to_host else "back"] += 1
        return wait

    def memory(like: Tensor) -> Tensor:
        found = torch.full(like.shape, torch.nan, dtype=like.dtype)
        found.on_host = True  # type: ignore[attr-defined]
        return found

    monkeypatch.setattr(checkpoints, "_streams", lambda device: streams)
    monkeypatch.setattr(checkpoints, "_beside", beside)
    monkeypatch.setattr(checkpoints, "_host_memory", memory)
    monkeypatch.setattr(checkpoints, "is_capturing", lambda device: False)
    monkeypatch.setattr(checkpoints, "_LEAST", 0)
    monkeypatch.setattr(checkpoints, "_PIECE", 500)
    return counts


def offloaded(reentrant: bool = False, layers: int = 5, **options: Any) -> Any:
    model = build("llama", num_hidden_layers=layers)
    liger_kernel.patch(model, offload_checkpoints=True, **options)
    return checkpointed(model.train(), reentrant)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("ahead", [0, 2**30])
def test_checkpoints_on_the_host(
    reentrant: bool, ahead: int, host: collections.Counter[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same numbers, bit for bit, over steps, accumulation, and backwards in any order."""
    monkeypatch.setattr(checkpoints, "_AHEAD", ahead)
    stock = build("llama", num_hidden_layers=5)
    liger_kernel.patch(stock)
    checkpointed(stock.train(), reentrant)
    ours = offloaded(reentrant)

    def losses(model: Any) -> list[Tensor]:
        return [model(**batch(seed=seed)).loss for seed in (0, 1, 2)]

    for keep in (False, True):
        for model in (stock, ours):
            model.zero_grad()
            a, b, c = losses(model)
            b.backward(retain_graph=keep)
            (a + c).backward()
            if keep:
                b.backward()
        for (name, p), q in zip(stock.named_parameters(), ours.parameters(), strict=True):
            assert p.grad is not None
            assert torch.equal(p.grad, q.grad), name
    # the last of five layers stays, unless backward comes once more; old releases of HF checkpoint the mask as well
    assert host["to host"] in (30, 60)
    assert host["to host"] == 60 or host["back"] == 12 + 12 + 5


def test_only_checkpoints_go(host: collections.Counter[str]) -> None:
    model = offloaded()
    model.gradient_checkpointing_disable()
    model(**batch()).loss.backward()
    model.eval()
    checkpointed(model, False)
    with torch.no_grad():
        model(**batch())
    assert not host
    liger_kernel.unpatch(model)
    model.train()(**batch()).loss.backward()
    assert not host


def test_wrapped_layers(host: collections.Counter[str]) -> None:
    """As FSDP's recipes and accelerate wrap them."""
    from torch.distributed.algorithms._checkpoint import checkpoint_wrapper as wrapper

    model = build("llama", num_hidden_layers=3)
    liger_kernel.patch(model, offload_checkpoints=True)
    expected = named_step(model, batch())
    layer = type(model.model.layers[0])
    wrapper.apply_activation_checkpointing(model, check_fn=lambda m: isinstance(m, layer))
    inputs = {**batch(), "use_cache": False}
    found = named_step(model, inputs, rename="_checkpoint_wrapped_module.")
    assert host in ({"to host": 3, "back": 2}, {"to host": 6, "back": 8})  # of old HF the mask, too
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_a_forward_that_fails_and_one_that_is_dropped(host: collections.Counter[str]) -> None:
    model = offloaded()
    expected = named_step(model, batch())

    def fail(module: nn.Module, args: Any) -> None:
        raise KeyboardInterrupt

    hook = model.model.layers[3].register_forward_pre_hook(fail)
    with pytest.raises(KeyboardInterrupt):
        model(**batch())
    hook.remove()
    top = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", lambda _: None)
    assert not top(False)
    dropped = model(**batch()).loss
    torch.autograd.grad(dropped, model.model.layers[4].mlp.up_proj.weight, retain_graph=True)
    del dropped
    found = named_step(model, batch())
    assert all(torch.equal(found[name], value) for name, value in expected.items())


@pytest.mark.parametrize("reentrant", [False, True])
def test_the_output_of_a_frozen_embedding_goes(
    reentrant: bool, host: collections.Counter[str]
) -> None:
    """HF makes a leaf of it, which its graph would keep on the device."""
    made = []
    steps = []
    for offload in (False, True):
        model = adapted()
        liger_kernel.patch(model, offload_checkpoints=offload)
        checkpointed(model.train(), reentrant)
        steps.append(named_step(model, batch()))
        model.model.model.embed_tokens.register_forward_hook(
            lambda module, args, out: made.append(weakref.ref(out.untyped_storage()))
        )
        loss = model(**batch()).loss
        assert (made[-1]() is None) == offload
        del loss
    for name, value in steps[0].items():
        assert torch.equal(value, steps[1][name]), name


def test_a_layer_that_writes_over_its_input(host: collections.Counter[str]) -> None:
    model = offloaded()

    def write(module: nn.Module, args: Any) -> None:
        with torch.no_grad():
            args[0].mul_(2)

    # within the checkpoint, which transformers 5.24 begins behind the hooks of the layer itself
    model.model.layers[2].input_layernorm.register_forward_pre_hook(write)
    with pytest.raises(RuntimeError, match="changed in place while it was copied to the host"):
        model(**batch())


def test_nested_checkpoints_copies_and_the_cpu(host: collections.Counter[str]) -> None:
    model = copy.deepcopy(offloaded(layers=3))
    expected = named_step(model, batch())
    assert host.pop("to host") in (3, 6)  # old releases checkpoint the mask as well
    host.clear()
    outer = partial(torch.utils.checkpoint.checkpoint, model, use_reentrant=False)
    loss = outer(**batch()).loss
    model.zero_grad()
    loss.backward()
    for name, p in model.named_parameters():
        assert torch.equal(p.grad, expected[name])


def test_on_the_cpu_nothing_moves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoints, "_LEAST", 0)
    monkeypatch.setattr(checkpoints.Copy, "__init__", None)
    model = offloaded()
    model(**batch()).loss.backward()


def test_the_boundaries_of_packed_sequences(monkeypatch: pytest.MonkeyPatch) -> None:
    """What flash attention would find in each layer is found once, and only where something is packed."""
    utils = pytest.importorskip("transformers.modeling_utils")
    flash = pytest.importorskip("transformers.modeling_flash_attention_utils")
    seen: list[Any] = []

    def attention(module: Any, q: Tensor, k: Tensor, v: Tensor, *args: Any, **given: Any) -> Any:
        seen.append([given.get(name) for name in checkpoints._BOUNDARIES])
        return q.transpose(1, 2), None

    monkeypatch.setitem(
        utils.ALL_ATTENTION_FUNCTIONS._local_mapping, "flash_attention_2", attention
    )
    model = build("llama")
    model.config._attn_implementation = model.model.config._attn_implementation = (
        "flash_attention_2"
    )
    liger_kernel.patch(model, long_context=True)
    ids = batch(1, 9)["input_ids"]
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 0, 1, 2]])
    model(input_ids=ids, position_ids=positions, use_cache=False)
    (q, k), (longest, _) = flash.prepare_fa_kwargs_from_position_ids(positions)
    for found in seen:
        assert torch.equal(found[0], q)
        assert torch.equal(found[1], k)
        assert found[2:] == [int(longest)] * 2 == [4, 4]
    assert len(seen) == 2
    seen.clear()
    model(input_ids=ids, position_ids=torch.arange(9)[None], use_cache=False)
    told = dict.fromkeys(checkpoints._BOUNDARIES[:2], q)
    model(input_ids=ids, position_ids=positions, use_cache=False, **told)
    assert seen[:2] == [[None] * 4] * 2
    assert seen[2][0] is q
    assert seen[2][2] is None
