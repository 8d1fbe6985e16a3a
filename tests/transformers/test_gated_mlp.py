"""A patched gated MLP: one op where its projections are plain Linears, their own calls wherever those matter."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import LlamaMLP

import liger_kernel
from liger_kernel.backends import use_implementation
from liger_kernel.testing import Make, assert_no_worse
from liger_kernel.transformers.patching.sites import mlps
from tests.who_keeps import TORCH_TELLS

HIDDEN, FEATURES, TOKENS = 16, 40, 12
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # where kernels run


class Adapter(nn.Linear):
    """A layer of somebody else's class."""


def mlp(bias: bool = False) -> Any:
    config = SimpleNamespace(
        hidden_size=HIDDEN, intermediate_size=FEATURES, mlp_bias=bias, hidden_act="silu"
    )
    module = LlamaMLP(config)
    liger_kernel.patch(nn.Sequential(module))
    return module


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Which ops ran: "gated_mlp" for the whole block, "glu" for its product alone."""
    found: list[str] = []

    def spy(module: Any, name: str) -> None:
        original = getattr(module, name)

        def spied(*args: Any) -> Any:
            found.append(name)
            size = len(found)
            result = original(*args)
            del found[size:]  # what the block is composed of where there are no kernels
            return result

        monkeypatch.setattr(module, name, spied)

    spy(mlps.gated_mlp_op, "gated_mlp")
    spy(mlps.glu_op, "glu")
    return found


def step(module: nn.Module) -> tuple[Tensor, ...]:
    """Output and gradients of input and weights."""
    dtype = next(module.parameters()).dtype
    x = Make(torch.float32).randn(2, TOKENS // 2, HIDDEN)
    x = x.to(next(module.parameters()).device, dtype).requires_grad_()
    y = module(x)
    module.zero_grad()
    y.square().sum().backward()
    found = [x.grad, *(p.grad for p in module.parameters() if p.requires_grad)]
    return y.detach(), *(g for g in found if g is not None)


def test_plain_linears_are_one_op(calls: list[str]) -> None:
    module = mlp()
    calls.clear()  # those of the proof
    step(module)
    assert calls == ["gated_mlp"]


@contextlib.contextmanager
def hooked(linear: Any, seen: list[Any], register: str = "register_forward_hook") -> Iterator[None]:
    handle = getattr(linear, register)(lambda *_: seen.append(1))
    yield
    handle.remove()


@contextlib.contextmanager
def hooked_everywhere(linear: Any, seen: list[Any]) -> Iterator[None]:
    def hook(module: Any, *_: Any) -> None:
        if module is linear:
            seen.append(1)

    handle = nn.modules.module.register_module_forward_hook(hook)
    yield
    handle.remove()


@contextlib.contextmanager
def replaced(linear: Any, seen: list[Any]) -> Iterator[None]:
    original = linear.forward

    def forward(x: Tensor) -> Any:
        seen.append(1)
        return original(x)

    linear.forward = forward
    yield
    del linear.forward


@contextlib.contextmanager
def replaced_in_class(linear: Any, seen: list[Any]) -> Iterator[None]:
    original = nn.Linear.forward

    def forward(self: nn.Linear, x: Tensor) -> Any:
        if self is linear:
            seen.append(1)
        return original(self, x)

    nn.Linear.forward = forward  # type: ignore[method-assign]
    yield
    nn.Linear.forward = original  # type: ignore[method-assign]


WAYS: dict[str, Callable[..., Any]] = {
    "hook": hooked,
    "hook before": partial(hooked, register="register_forward_pre_hook"),
    "hook backward": partial(hooked, register="register_full_backward_hook"),
    "hook on all modules": hooked_everywhere,
    "forward of its own": replaced,
    "another forward of the class": replaced_in_class,
}


@pytest.mark.parametrize("name", ["gate_proj", "up_proj", "down_proj"])
@pytest.mark.parametrize("way", WAYS)
def test_whoever_watches_a_projection_sees_its_call(way: str, name: str, calls: list[str]) -> None:
    module = mlp()
    alone = step(module)
    calls.clear()
    seen: list[Any] = []
    with WAYS[way](getattr(module, name), seen):
        watched = step(module)
    assert seen == [1]
    # such a hook has to see the activation, too, which only HF's code calls
    assert calls == ([] if way == "hook on all modules" else ["glu"])
    high = step(copy.deepcopy(module).double())
    for ours, truth, low in zip(watched, high, alone, strict=True):
        assert_no_worse(way, ours, truth, low)
    calls.clear()
    step(module)
    assert calls == ["gated_mlp"]  # as before, once nobody watches any more


@pytest.mark.parametrize("name", ["gate_proj", "up_proj", "down_proj"])
def test_layers_of_other_classes_keep_their_calls(name: str, calls: list[str]) -> None:
    module = mlp()
    calls.clear()
    linear = getattr(module, name)
    setattr(module, name, Adapter(linear.in_features, linear.out_features, bias=False))
    step(module)
    assert calls == ["glu"]


def test_biases_keep_their_calls(calls: list[str]) -> None:
    module = mlp(bias=True)
    calls.clear()
    step(module)
    assert calls == ["glu"]


def test_weights_of_another_dtype_are_left_to_the_linears(calls: list[str]) -> None:
    module = mlp().bfloat16()
    calls.clear()
    with pytest.raises(RuntimeError, match="dtype"):
        module(torch.randn(3, HIDDEN))
    with torch.autocast("cpu", torch.bfloat16):
        assert module(torch.randn(3, HIDDEN)).dtype == torch.bfloat16
    assert calls == ["glu"]


def saved(module: nn.Module) -> int:
    """Elements kept for backward, besides parameters."""
    parameters = {p.untyped_storage().data_ptr() for p in module.parameters()}
    kept: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage.nbytes() // t.element_size()
        return t

    x = torch.randn(TOKENS, HIDDEN, device=DEVICE, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = module(x)
    del y
    return sum(kept.values())


@pytest.fixture
def interpreted() -> Iterator[None]:
    """Kernels alone make the product again, and can write the gradients of gate and up over gate and up."""
    with use_implementation("triton"):
        yield


def test_the_product_is_not_kept(interpreted: None) -> None:
    module = mlp().to(DEVICE)
    fused = saved(module)
    with hooked(module.up_proj, []):
        single = saved(module)
    assert fused == TOKENS * (HIDDEN + 2 * FEATURES)
    assert single >= fused + TOKENS * FEATURES


def test_memory_is_reused_where_nobody_can_see_it(interpreted: None) -> None:
    """Gate and up give their memory to their gradients, unless the graph, or somebody else, keeps them."""
    module = mlp().to(DEVICE)
    x = Make(torch.float32, DEVICE).randn(TOKENS, HIDDEN).requires_grad_()
    wanted = [x, *module.parameters()]
    held: list[tuple[Tensor, Tensor]] = []

    def pack(t: Tensor) -> Tensor:
        held.append((t, t.clone()))
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = module(x)
    first = torch.autograd.grad(y.square().sum(), wanted)
    assert len(held) > 3
    assert all(torch.equal(t, was) for t, was in held)

    loss = module(x).square().sum()
    for retain in (True, True, False):
        again = torch.autograd.grad(loss, wanted, retain_graph=retain)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))

    y = module(x)
    (inner,) = [n for n, _ in y.grad_fn.next_functions if n is not None and "Product" in n.name()]
    gate, was = inner.saved_tensors[1], inner.saved_tensors[1].clone()
    torch.autograd.grad(y.square().sum(), wanted)
    assert torch.equal(gate, was) is not TORCH_TELLS


@pytest.mark.parametrize("first", ["x", "down"])
def test_a_second_backward_without_retain_graph_is_refused(first: str, interpreted: None) -> None:
    """Whatever the first one asked for: the memory of gate and up is gone."""
    module = mlp().to(DEVICE)
    x = Make(torch.float32, DEVICE).randn(TOKENS, HIDDEN).requires_grad_()
    inputs = {"x": x, "down": module.down_proj.weight}
    y = module(x)
    torch.autograd.grad(y, inputs[first], torch.ones_like(y))
    for wanted in inputs.values():
        with pytest.raises(RuntimeError, match="a second time"):
            torch.autograd.grad(y, wanted, torch.ones_like(y))


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed(reentrant: bool, interpreted: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same gradients; and the last product is not made again where recomputing can stop before it."""
    from torch.utils.checkpoint import checkpoint

    from liger_kernel.ops import gated_mlp as op

    module = mlp().to(DEVICE)
    alone = step(module)
    products = []
    forward = op._Down.forward
    monkeypatch.setattr(
        op._Down, "forward", staticmethod(lambda *args: products.append(1) or forward(*args))
    )
    module_of = module.forward
    module.__dict__["forward"] = lambda x: checkpoint(module_of, x, use_reentrant=reentrant)
    for a, b in zip(alone, step(module), strict=True):
        assert torch.equal(a, b)
    # reentrant checkpointing runs its forward without a graph, so composed of single ops
    assert len(products) == 1


def test_no_second_derivative(interpreted: None) -> None:
    module = mlp().to(DEVICE)
    y = module(torch.randn(3, HIDDEN, device=DEVICE, requires_grad=True))
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(y.sum(), module.gate_proj.weight, create_graph=True)


@pytest.mark.parametrize("frozen", ["gate_proj", "up_proj", "down_proj", "all"])
def test_frozen_weights_get_no_gradient(frozen: str) -> None:
    module = mlp()
    everything = step(module)
    for name in ("gate_proj", "up_proj", "down_proj"):
        getattr(module, name).weight.requires_grad_(frozen not in (name, "all"))
    names = [n for n, _ in module.named_parameters()]
    some = step(module)
    kept = [n for n, p in module.named_parameters() if p.requires_grad]
    expected = [everything[2 + names.index(n)] for n in kept]
    assert len(some) == 2 + len(kept)
    for a, b in zip(some, (*everything[:2], *expected), strict=True):
        assert torch.equal(a, b)
