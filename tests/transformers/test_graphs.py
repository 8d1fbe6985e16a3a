"""`patch(model, cuda_graphs=True)`: who is replayed, with a stand-in for the capture. tests/gpu has the real one."""

from __future__ import annotations

import copy
import pickle
import pkgutil
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("transformers")
import liger_kernel
from liger_kernel.backends import graphs as device_graphs
from liger_kernel.backends import host_bound, host_is_free, on_paper
from liger_kernel.backends.nvidia import ON_PAPER
from tests.transformers.tiny import build
from tests.who_keeps import where_torch_tells

pytestmark = where_torch_tells  # elsewhere no layer is captured
COUNTS = {"captured": 0, "forward": 0, "backward": 0}
WEIGHTS: set[int] = set()


class StandIn:
    """Works as a graph does: in the same memory each time, on what was there when it was captured."""

    def __init__(
        self,
        function: Callable[..., Sequence[Tensor]],
        inputs: Sequence[Tensor],
        wanted: Sequence[Tensor],
        pool: Any,
    ):
        COUNTS["captured"] += 1
        self.function, self.inputs, self.wanted = function, inputs, wanted
        # where gradients of a weight arrive belongs to the stream of its first use
        assert not WEIGHTS & {id(t) for t in wanted}
        with torch.random.fork_rng():
            outputs = self._run()
            self.differentiable = [y.requires_grad for y in outputs]
            self.outputs = [y.detach().clone() for y in outputs]
            self.from_above = [torch.ones_like(y) for y in outputs if y.requires_grad and wanted]
            self.gradients = list(self._gradients(outputs)) if wanted else []

    def _run(self) -> Sequence[Tensor]:
        self.random = torch.get_rng_state()
        with torch.set_grad_enabled(bool(self.wanted)):
            return self.function(*self.inputs)

    def _gradients(self, outputs: Sequence[Tensor]) -> Any:
        roots = [y for y in outputs if y.requires_grad]
        return torch.autograd.grad(roots, self.wanted, self.from_above, allow_unused=True)

    def forward(self) -> None:
        COUNTS["forward"] += 1
        for static, y in zip(self.outputs, self._run(), strict=True):
            static.copy_(y.detach())

    def backward(self) -> None:
        COUNTS["backward"] += 1
        with torch.random.fork_rng(), torch.enable_grad():
            torch.set_rng_state(self.random)
            found = self._gradients(self._run())
        for static, grad in zip(self.gradients, found, strict=True):
            if static is not None:
                static.copy_(grad)


@pytest.fixture(autouse=True)
def captures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device_graphs, "Captured", StandIn)
    monkeypatch.setattr(device_graphs, "has_graphs", lambda device: True)
    monkeypatch.setattr(device_graphs, "are_here", lambda: True)
    monkeypatch.setattr(device_graphs, "new_pool", lambda device: object())
    COUNTS.update(dict.fromkeys(COUNTS, 0))
    WEIGHTS.clear()  # of models that are gone, whose places others take


def pair(kind: str = "qwen3", **settings: Any) -> tuple[Any, Any]:
    """A patched model, and one with graphs; both compute the same to the bit."""
    torch.manual_seed(0)
    model = build(kind, **settings).train()
    other = copy.deepcopy(model)
    liger_kernel.patch(model)
    liger_kernel.patch(other, cuda_graphs=True)
    WEIGHTS.clear()
    WEIGHTS.update(map(id, other.parameters()))
    return model, other


def layers(model: Any) -> Any:
    return model.model.layers


def ids(length: int = 7, batch: int = 2) -> Tensor:
    return torch.randint(0, 50, (batch, length), generator=torch.Generator().manual_seed(length))


def loss_of(model: Any, length: int = 7, **more: Any) -> Tensor:
    tokens = ids(length)
    loss: Tensor = model(input_ids=tokens, labels=tokens, use_cache=False, **more).loss
    return loss


def same(model: Any, other: Any) -> None:
    for (name, p), q in zip(model.named_parameters(), other.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None), name
        assert p.grad is None or torch.equal(p.grad, q.grad), name


def step(model: Any, *lengths: int, **more: Any) -> list[float]:
    """Gradients of all lengths are added up, and a step of SGD follows."""
    losses = []
    for length in lengths:
        loss = loss_of(model, length, **more)
        loss.backward()
        losses.append(loss.item())
    return losses


def forget(model: Any) -> None:
    with torch.no_grad():
        for p in model.parameters():
            if p.grad is not None:
                p -= 0.1 * p.grad
    model.zero_grad(set_to_none=True)


def test_steps_that_are_replayed_are_those_of_before() -> None:
    """Accumulated over two batches, whose gradients are of one size: the first is there when the second is added."""
    model, other = pair()
    n = len(layers(model))
    kept: list[Tensor] = []
    for number in range(4):
        assert step(model, 7, 7) == step(other, 7, 7)
        same(model, other)
        first = next(layers(other)[0].parameters())
        kept.append(first.grad)
        assert all(a.data_ptr() != b.data_ptr() for a in kept for b in kept if a is not b)
        for m in (model, other):
            forget(m)
        replays = n * (2 * number + 1)
        assert list(COUNTS.values()) == [n, replays, replays]


def test_changing_lengths_evaluation_and_modes() -> None:
    model, other = pair()
    for _ in range(2):
        for length in (7, 5, 9):
            assert step(model, length) == step(other, length)
            with torch.no_grad():
                for m in (model, other):
                    m.eval()
                assert torch.equal(model(input_ids=ids(6)).logits, other(input_ids=ids(6)).logits)
                for m in (model, other):
                    m.train()
        same(model, other)
        for m in (model, other):
            forget(m)
    assert COUNTS["captured"] == 3 * len(layers(model))  # generation's caches are not captured
    assert COUNTS["forward"] == COUNTS["captured"]


def test_two_forwards_before_a_backward() -> None:
    """The second runs the layer's own code, in memory of its own."""
    model, other = pair()
    for m in (model, other):
        step(m, 7)
        m.zero_grad()
    losses = [[loss_of(m), loss_of(m) * 3] for m in (model, other)]
    assert COUNTS["forward"] == len(layers(model))
    assert [x.item() for x in losses[0]] == [x.item() for x in losses[1]]
    for of_model in losses:
        for loss in reversed(of_model):
            loss.backward()
    same(model, other)
    assert "two forwards" in str(
        [r.reason for r in liger_kernel.patch(other, cuda_graphs=True).rows]
    )
    del losses, of_model, loss
    loss_of(other)  # its graph is dropped without a backward
    loss_of(other)
    assert COUNTS["forward"] == 3 * len(layers(model))


def test_a_second_backward_is_refused() -> None:
    _, other = pair()
    step(other, 7)
    loss = loss_of(other)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="without cuda_graphs"):
        loss.backward()


def test_outputs_stay_what_they_were() -> None:
    _, other = pair()
    layer = layers(other)[0]
    width = other.config.hidden_size
    head = other.config.head_dim
    x = torch.randn(2, 7, width)
    kwargs = {"position_embeddings": (torch.ones(1, 7, head), torch.zeros(1, 7, head))}
    found = [layer(x, **kwargs) for _ in range(3)]
    assert COUNTS["forward"] == 1  # then its own code: the first is not done
    del found
    with torch.no_grad():
        found = [layer(x * i, **kwargs) for i in (1, 1, 2)]
        assert COUNTS["forward"] == 3
        assert torch.equal(found[0], found[1])
        assert not torch.equal(found[1], found[2])


Change = Callable[[Any], Any]


def _hook(model: Any) -> Any:
    return layers(model)[0].mlp.register_forward_hook(lambda m, args, y: y * 2)


def _frozen(model: Any) -> Any:
    layers(model)[0].mlp.up_proj.weight.requires_grad_(False)


def _moved(model: Any) -> Any:
    weight = layers(model)[0].mlp.up_proj.weight
    weight.data = weight.data * 2


def _scaled(model: Any) -> Any:
    layers(model)[0].self_attn.scaling *= 2


def _another_child(model: Any) -> Any:
    layers(model)[0].mlp.act_fn = nn.Tanh()


def _config(model: Any) -> Any:
    model.set_attn_implementation("sdpa")


def _another_class(model: Any) -> Any:
    mlp = layers(model)[0].mlp
    cls = type(mlp)
    mlp.__class__ = type(cls.__name__, (cls,), {"forward": lambda s, x: 2 * cls.forward(s, x)})


@pytest.mark.parametrize(
    "change", [_hook, _frozen, _moved, _scaled, _another_child, _another_class, _config]
)
def test_what_becomes_of_the_module_counts(change: Change) -> None:
    model, other = pair()
    for m in (model, other):
        step(m, 7, 7)
        m.zero_grad()
        change(m)
    replayed = COUNTS["forward"]
    for number in range(3):
        assert step(model, 7) == step(other, 7)
        same(model, other)
        if not number:  # what was captured would do what it did
            assert COUNTS["forward"] < replayed + len(layers(model))


@pytest.mark.parametrize("name", ["Qwen3MLP.forward", "apply_rotary_pos_emb"])
def test_code_that_is_replaced_counts(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """That of a class, and a function of its file."""
    model, other = pair()
    for m in (model, other):
        step(m, 7, 7)
        m.zero_grad()
    replayed = COUNTS["forward"]
    at = f"{type(model).__module__}.{name}"
    original = pkgutil.resolve_name(at)
    monkeypatch.setattr(at, lambda *args, **kwargs: original(*args, **kwargs))
    assert step(model, 7) == step(other, 7)
    same(model, other)
    assert COUNTS["forward"] == replayed


class Counts(nn.Module):
    """As a BatchNorm keeps statistics; or what it is given becomes another."""

    def __init__(self, count: bool):
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))
        self.count = count

    def forward(self, x: Tensor) -> Tensor:
        if self.count:
            self.calls += 1
        else:
            x *= 2
        return x


def test_a_capture_leaves_buffers_as_they_were() -> None:
    model, other = pair()
    for m in (model, other):
        layers(m)[0].mlp.act_fn = Counts(True)
    for number in range(1, 4):
        with torch.no_grad():
            assert torch.equal(loss_of(model), loss_of(other))
        assert layers(other)[0].mlp.act_fn.calls == layers(model)[0].mlp.act_fn.calls == number
    assert COUNTS["captured"]


def test_a_layer_that_writes_over_its_input() -> None:
    """Somebody may hold it: the layer runs its own code."""
    model, other = pair()
    kwargs = {"position_embeddings": (torch.ones(1, 7, 16), torch.zeros(1, 7, 16))}
    for m in (model, other):
        layers(m)[0].input_layernorm = Counts(False)
    for _ in range(3):
        given = [torch.ones(2, 7, 48) for _ in range(2)]
        with torch.no_grad():
            outputs = [
                layers(m)[0](x, **kwargs) for m, x in zip((model, other), given, strict=True)
            ]
        assert torch.equal(*outputs)
        assert torch.equal(*given)
    reasons = [r.reason for r in liger_kernel.patch(other, cuda_graphs=True).rows]
    assert any("writes over what it is given" in reason for reason in reasons)


def test_adapters_are_switched_and_merged() -> None:
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    models = []
    base = build("llama")
    for graphs in (False, True):
        config = peft.LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
        torch.manual_seed(1)
        wrapped = peft.get_peft_model(copy.deepcopy(base), config).train()
        wrapped.add_adapter("other", config)
        liger_kernel.patch(wrapped, cuda_graphs=graphs)
        models.append(wrapped)
    for p, q in zip(models[0].parameters(), models[1].parameters(), strict=True):
        q.data.copy_(p.data)
    for name in ("default", "other", "default"):
        for m in models:
            m.set_adapter(name)
        for _ in range(3):
            assert step(models[0], 7) == step(models[1], 7)
            same(*models)
    replayed = COUNTS["forward"]
    assert replayed
    for m in models:
        m.merge_adapter()  # its list of names is changed in place
    assert torch.equal(loss_of(models[0]), loss_of(models[1]))
    assert COUNTS["forward"] == replayed


def test_checkpointing_is_left_alone() -> None:
    model, other = pair()
    for m in (model, other):
        m.gradient_checkpointing_enable({"use_reentrant": False})
    for _ in range(3):
        assert step(model, 7) == step(other, 7)
    same(model, other)
    assert not COUNTS["captured"]
    rows = [r for r in liger_kernel.patch(other, cuda_graphs=True).rows if r.kind == "graphs"]
    assert rows[0].reason == "gradient checkpointing is on"


def test_dropout_draws_anew() -> None:
    model, other = pair("llama", attention_dropout=0.5)
    for _ in range(3):
        torch.manual_seed(3)
        ours = step(model, 7, 7)
        torch.manual_seed(3)
        assert step(other, 7, 7) == ours
        assert ours[0] != ours[1]
    same(model, other)


def test_autocast() -> None:
    model, other = pair()
    for _ in range(3):
        with torch.autocast("cpu", torch.bfloat16):
            losses = [loss_of(m) for m in (model, other)]
        for loss in losses:
            loss.backward()
        assert losses[0].item() == losses[1].item()
        assert step(model, 7) == step(other, 7)
    same(model, other)


def test_what_cannot_be_captured_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any) -> Any:
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    model, other = pair()
    monkeypatch.setattr(device_graphs, "Captured", refuse)
    for _ in range(3):
        assert step(model, 7) == step(other, 7)
    same(model, other)
    rows = [r for r in liger_kernel.patch(other, cuda_graphs=True).rows if r.kind == "graphs"]
    assert "cannot be captured: RuntimeError: operation not permitted" in rows[0].reason


def test_copies_pickles_and_unpatch() -> None:
    model, other = pair()
    for m in (model, other):
        step(m, 7, 7)
        m.zero_grad()
    rows = liger_kernel.patch(other, cuda_graphs=True).rows
    assert not any(row.reason for row in rows if row.kind == "graphs")
    step(other, 7)
    other.zero_grad()
    assert COUNTS["captured"] == len(layers(model))  # nothing was lost
    for made in (copy.deepcopy(other), pickle.loads(pickle.dumps(other))):
        before = COUNTS["captured"]
        for _ in range(2):
            assert step(model, 7) == step(made, 7)
        same(model, made)
        model.zero_grad()
        assert COUNTS["captured"] == before + len(layers(model))
    records = [m.__dict__["_liger_graphs_of"] for m in layers(other)]
    liger_kernel.unpatch(other)
    assert all(not r.states for r in records)
    assert all("forward" not in m.__dict__ for m in layers(other))
    replayed = COUNTS["forward"]
    step(other, 7)
    assert COUNTS["forward"] == replayed


def test_kernels_are_captured_where_the_host_would_count() -> None:
    with on_paper(ON_PAPER):
        x = torch.empty(8, device="meta")
        assert host_bound(x, 8)
        with host_is_free():
            assert not host_bound(x, 8)
        assert host_bound(x, 8)


def test_without_a_device_that_has_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    model = build("llama")
    with pytest.raises(ValueError, match="cuda_graphs=True needs a GPU"):
        liger_kernel.patch(model, cuda_graphs=True)
    assert "forward" not in layers(model)[0].__dict__
