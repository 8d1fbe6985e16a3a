"""How far autograd reaches into ops and losses: transforms of functions, tensors without numbers, a second backward."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx

from liger_kernel.backends import use_implementation
from liger_kernel.loss_head.losses import ROW_LOSSES, row_loss_class
from liger_kernel.loss_head.node import linear_loss
from liger_kernel.loss_head.plan import ChunkOptions
from liger_kernel.loss_head.row_loss import RowLoss
from liger_kernel.testing import Make, OpCase, OpSpec, assert_draws_no_worse, specs
from tests.chunked_loss import test_declared, test_distillation
from tests.loss_head import test_row_losses

Tensors = list[Any]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@dataclass(frozen=True)
class Call:
    """A differentiable call: of its inputs, `wanted` get gradients; of its outputs, the first `n_differentiable`."""

    function: Callable[..., Any]
    draw: Callable[[int], Tensors]
    wanted: tuple[int, ...]
    without_grad: tuple[int, ...] = ()
    plain: Callable[..., Any] | None = None  # the same in PyTorch's own ops

    def drawn(self, seed: int) -> Tensors:
        return [t.to(DEVICE) if isinstance(t, Tensor) else t for t in self.draw(seed)]

    def outputs(self, *inputs: Any) -> list[Tensor]:
        found = self.function(*inputs)
        found = found if isinstance(found, tuple) else (found,)
        return [t for i, t in enumerate(found) if t is not None and i not in self.without_grad]

    def total(self, *inputs: Any) -> Tensor:
        """One number that every differentiable output has a part in."""

        def weighed(t: Tensor) -> Tensor:
            rising = torch.arange(t.numel(), device=t.device).to(t.dtype) / (t.numel() or 1)
            return (t * (0.5 + rising).view(t.shape)).sum()

        return torch.stack([weighed(t) for t in self.outputs(*inputs)]).sum()

    def leaves(self, inputs: Tensors, dtype: torch.dtype | None = None) -> Tensors:
        return [
            t
            if not isinstance(t, Tensor) or not t.is_floating_point()
            else t.detach().to(dtype or t.dtype).requires_grad_(i in self.wanted)
            for i, t in enumerate(inputs)
        ]

    def gradients(self, inputs: Tensors) -> list[Tensor]:
        wanted = [inputs[i] for i in self.wanted]
        return list(
            torch.autograd.grad(
                self.total(*inputs), wanted, allow_unused=True, materialize_grads=True
            )
        )


def of_op(spec: OpSpec, case: OpCase) -> Call:
    inputs = case.inputs(Make(torch.float32))
    return Call(
        partial(spec.function, **case.options),
        lambda seed: list(case.inputs(Make(torch.float32, seed=seed))),
        tuple(i for i in spec.differentiable if inputs[i] is not None),
        (*spec.outputs_without_grad, *case.unused),
        partial(spec.reference, **case.options),
    )


def of_row_loss(loss: RowLoss) -> Call:
    def call(hidden: Any, weight: Any, bias: Any, target: Any, *teacher: Any) -> Any:
        return linear_loss(
            loss,
            hidden,
            weight,
            target,
            bias,
            teacher=teacher if loss.reads_teacher else None,  # type: ignore[arg-type]
            chunks=ChunkOptions(chunk_size=9),
        )[0]

    def draw(seed: int) -> Tensors:
        i = test_row_losses.inputs(torch.float32, seed=seed)
        return [
            i[n] for n in ("hidden", "weight", "bias", "target", "t_hidden", "t_weight", "t_bias")
        ]

    return Call(call, draw, (0, 1, 2))


def of_chunked_loss(name: str) -> Call:
    given = test_declared.arguments(name)
    prefix = "student_" if "student_input" in given else ""
    names = [f"{prefix}input" if prefix else "_input", f"{prefix or 'lin_'}weight", f"{prefix}bias"]
    names += [n for n in given if n not in names]
    module = test_declared.module_of(name)()

    def call(*tensors: Any) -> Any:
        found = module(**dict(zip(names, tensors, strict=True)))
        return found[0] if isinstance(found, tuple) else found

    def draw(seed: int) -> Tensors:
        drawn = test_declared.arguments(name, seed)
        return [drawn[n] for n in names]

    return Call(call, draw, (0, 1, 2))


def of_own_loss() -> Call:
    def draw(seed: int) -> Tensors:
        i = test_distillation.draw_pair(torch.float32)(seed)
        return [
            i[n] for n in ("hidden", "weight", "t_hidden", "t_weight", "target", "bias", "t_bias")
        ]

    return Call(test_distillation.Own.apply, draw, (0, 1, 5))


OPS = {
    f"{spec.name}-{case.id}": of_op(spec, case)
    for spec in specs().values()
    for case in spec.cases
    if not case.large and spec.differentiable
}
FIRST = {f"{spec.name}-{spec.cases[0].id}" for spec in specs().values()}
LOSSES = {
    f"{cls.__name__}-{reduction}": of_row_loss(test_row_losses.made(cls, reduction))
    for cls in (*map(row_loss_class, ROW_LOSSES), test_row_losses.Focal)
    for reduction in ("mean", "none")
} | {name: of_chunked_loss(name) for name in test_declared.NAMES}
CALLS = {name: call for name, call in OPS.items() if name in FIRST} | LOSSES
OWN = {"own-distillation": of_own_loss()}


def every(calls: dict[str, Call]) -> Any:
    return pytest.mark.parametrize("call", [pytest.param(c, id=name) for name, c in calls.items()])


@pytest.fixture(autouse=True)
def on_one_thread() -> Any:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(params=["reference", "triton"])
def implementation(request: pytest.FixtureRequest) -> Any:
    with use_implementation(request.param):
        yield request.param


def check_shapes(call: Call, shadows: Tensors, real: Tensors, outputs: list[Tensor]) -> None:
    for shadow, found in zip(call.outputs(*shadows), outputs, strict=True):
        assert (shadow.shape, shadow.dtype) == (found.shape, found.dtype)
    for i, grad in zip(call.wanted, call.gradients(shadows), strict=True):
        assert (grad.shape, grad.dtype) == (real[i].shape, real[i].dtype)
        assert grad.device == shadows[i].device


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@every(OPS | LOSSES)
def test_meta_tensors(call: Call, dtype: torch.dtype) -> None:
    if dtype == torch.float32 and call not in CALLS.values():
        pytest.skip(
            "in float32, what bfloat16 has in two dtypes is in one: a case of each op will do"
        )
    real = call.leaves(call.drawn(0), dtype)
    shadows = [t.detach().to("meta") if isinstance(t, Tensor) else t for t in real]
    outputs = call.outputs(*real)
    with torch.device("meta"):
        check_shapes(call, call.leaves(shadows), real, outputs)


@every(OPS | LOSSES)
def test_fake_tensors(call: Call, implementation: str) -> None:
    if call not in CALLS.values():
        pytest.skip("who is asked for nothing but shapes depends on the op, not on the case")
    real = call.leaves(call.drawn(0))
    outputs, plain = call.outputs(*real), constants(real)
    with FakeTensorMode() as mode:
        shadows = [mode.from_tensor(t) if isinstance(t, Tensor) else t for t in plain]
        check_shapes(call, call.leaves(shadows), real, outputs)


def over(call: Call, inputs: Tensors) -> tuple[Callable[..., Any], list[Tensor]]:
    """The total as a function of the wanted inputs, and these."""

    def function(*wanted: Any) -> Tensor:
        given = list(inputs)
        for i, t in zip(call.wanted, wanted, strict=True):
            given[i] = t
        return call.total(*given)

    return function, [inputs[i].detach() for i in call.wanted]


def constants(inputs: Tensors) -> Tensors:
    return [t.detach() if isinstance(t, Tensor) else t for t in inputs]


def as_exact_as_eager(
    call: Call, ours: Callable[[Tensors], list[Tensor]], eager: Callable[[Tensors], Any]
) -> None:
    """`ours` of inputs in float32 against `eager` in float64 and float32."""

    def draw(seed: int) -> Any:
        inputs = call.drawn(seed)
        runs = (
            ours(call.leaves(inputs)),
            eager(call.leaves(inputs, torch.float64)),
            eager(call.leaves(inputs)),
        )
        return [{f"number {i}": t.detach() for i, t in enumerate(run)} for run in runs]

    assert_draws_no_worse(draw)


@every(CALLS)
def test_func_grad(call: Call) -> None:
    def ours(inputs: Tensors) -> list[Tensor]:
        function, at = over(call, constants(inputs))
        return list(torch.func.grad(function, argnums=tuple(range(len(at))))(*at))

    as_exact_as_eager(call, ours, call.gradients)


@every(CALLS)
def test_vmap(call: Call) -> None:
    """Of the call, and of its gradient: one for each of several inputs."""

    def mapped(call: Call, inputs: Tensors) -> list[Tensor]:
        inputs = constants(inputs)
        there = [i for i, t in enumerate(inputs) if isinstance(t, Tensor)]

        def of_one(*tensors: Any) -> Any:
            given = list(inputs)
            for i, t in zip(there, tensors, strict=True):
                given[i] = t
            function, at = over(call, given)
            grads = torch.func.grad(function, argnums=tuple(range(len(at))))(*at)
            return [call.total(*given), *grads]

        twice = [torch.stack([inputs[i], inputs[i]]) for i in there]
        return [t[1] for t in torch.func.vmap(of_one)(*twice)]

    def eager(inputs: Tensors) -> list[Tensor]:
        # products of a batch are rounded in another order than those of one: on a GPU eager's are several times off
        if call.plain is not None and inputs[call.wanted[0]].dtype != torch.float64:
            return mapped(replace(call, function=call.plain), inputs)
        return [call.total(*inputs), *call.gradients(inputs)]

    as_exact_as_eager(call, partial(mapped, call), eager)


def tangents_of(at: list[Tensor]) -> list[Tensor]:
    g = torch.Generator().manual_seed(5)
    return [torch.randn(t.shape, generator=g, dtype=torch.float32).to(t) for t in at]


def directional(call: Call, inputs: Tensors) -> list[Tensor]:
    grads = call.gradients(inputs)
    pairs = zip(grads, tangents_of(grads), strict=True)
    return [torch.stack([(g * t).sum() for g, t in pairs]).sum()]


@every(CALLS)
def test_func_jvp(call: Call) -> None:
    def ours(inputs: Tensors) -> list[Tensor]:
        function, at = over(call, constants(inputs))
        value, slope = torch.func.jvp(function, tuple(at), tuple(tangents_of(at)))
        return [
            slope.to(value.dtype)
        ]  # PyTorch's slope of a float by an integer, by a number, is in float64

    as_exact_as_eager(call, ours, partial(directional, call))


@every(CALLS)
def test_forward_mode(call: Call) -> None:
    def ours(inputs: Tensors) -> list[Tensor]:
        function, at = over(call, constants(inputs))
        with forward_ad.dual_level():
            duals = [forward_ad.make_dual(*pair) for pair in zip(at, tangents_of(at), strict=True)]
            value, slope = forward_ad.unpack_dual(function(*duals))
            return [slope.to(value.dtype)]

    as_exact_as_eager(call, ours, partial(directional, call))


@every(CALLS)
def test_second_derivatives_by_torch_func(call: Call) -> None:
    """Forward over reverse, and reverse over forward."""
    function, at = over(call, constants(call.leaves(call.drawn(0), torch.float64)))
    tangents, every_one = tuple(tangents_of(at)), tuple(range(len(at)))
    grads = torch.func.grad(function, argnums=every_one)
    _, curvature = torch.func.jvp(grads, tuple(at), tangents)

    def slope(*at: Tensor) -> Tensor:
        return torch.func.jvp(function, at, tangents)[1]

    other = torch.func.grad(slope, argnums=every_one)(*at)
    torch.testing.assert_close([t.to(a) for t, a in zip(other, at, strict=True)], list(curvature))


@every(CALLS | OWN)
def test_retained_graph(call: Call) -> None:
    """Each backward gives what a backward of its own graph gives, whatever came before it."""
    inputs = call.leaves(call.drawn(0))
    wanted = [inputs[i] for i in call.wanted]
    total = call.total(*inputs)
    scales = (0.7, 1.0, -2.0)
    found = [
        torch.autograd.grad(total * scale, wanted, retain_graph=scale != scales[-1])
        for scale in scales
    ]
    for grads, scale in zip(found, scales, strict=True):
        alone = torch.autograd.grad(call.total(*inputs) * scale, wanted)
        assert all(map(torch.equal, grads, alone))
    with pytest.raises(RuntimeError, match="retain_graph=True"):
        torch.autograd.grad(total, wanted)


def has_node_of_ours(t: Tensor) -> bool:
    waiting = [t.grad_fn]
    while waiting:
        node = waiting.pop()
        if isinstance(node, torch.autograd.function.BackwardCFunction):
            return True
        waiting += [other for other, _ in getattr(node, "next_functions", ())]
    return False


@every(CALLS | OWN)
def test_gradients_of_gradients_are_refused(call: Call, implementation: None) -> None:
    """By nodes of ours. Where an op is PyTorch code, it has the derivatives of PyTorch."""
    inputs = call.leaves(call.drawn(0))
    wanted = [inputs[i] for i in call.wanted]
    total = call.total(*inputs)
    if not has_node_of_ours(total):
        first = torch.autograd.grad(total, wanted, create_graph=True, allow_unused=True)
        batched = torch.autograd.grad(
            total, wanted, torch.ones(3), is_grads_batched=True, allow_unused=True
        )
        for one, three in zip(first, batched, strict=True):
            assert one is None or three.shape == (3, *one.shape)
        return
    with pytest.raises(RuntimeError, match=r"no second derivative.*torch\.func"):
        torch.autograd.grad(total, wanted, create_graph=True)
    total = call.total(*inputs)
    with pytest.raises(RuntimeError, match=r"one gradient at a time.*torch\.func"):
        torch.autograd.grad(total, wanted, torch.ones(3), is_grads_batched=True)


@every(CALLS)
def test_traces(call: Call, implementation: None) -> None:
    """By torch.jit and by make_fx: of PyTorch's own ops, so that they can be saved, and right for other inputs."""
    inputs, others = (constants(call.drawn(seed)) for seed in (0, 1))
    there = [i for i, t in enumerate(inputs) if isinstance(t, Tensor)]

    def function(*tensors: Any) -> Tensor:
        given = list(inputs)
        for i, t in zip(there, tensors, strict=True):
            given[i] = t
        return call.total(*given)

    example, other = ([given[i] for i in there] for given in (inputs, others))
    traced = torch.jit.trace(function, example, check_trace=False)
    file = io.BytesIO()
    torch.jit.save(traced, file)
    file.seek(0)
    graph = make_fx(function)(*example)
    called = {str(node.target) for node in graph.graph.nodes if node.op == "call_function"}
    assert all(name.startswith("aten.") or "getitem" in name for name in called)
    with use_implementation("reference"):
        expected = function(*other)
    for found in (torch.jit.load(file)(*other), graph(*other)):
        torch.testing.assert_close(found, expected)


COMPILED = ("CrossEntropyLoss-mean", "dpo", "jsd", next(name for name in FIRST if "glu" in name))


@every({name: CALLS[name] for name in COMPILED})
def test_transforms_within_a_compiled_graph(call: Call) -> None:
    function, at = over(call, constants(call.drawn(0)))

    def transformed(*at: Tensor) -> Any:
        slope = torch.func.jvp(function, at, at)[1]
        twice = [torch.stack([t, t]) for t in at]
        return slope, torch.func.grad(function)(*at), torch.func.vmap(function)(*twice)

    torch._dynamo.reset()
    found = torch.compile(transformed, backend="aot_eager", fullgraph=True)(*at)
    torch.testing.assert_close(found, transformed(*at))


def test_gradients_of_gradients_of_the_library_op_are_refused() -> None:
    """Without AOT autograd, which refuses them itself."""
    call = CALLS["CrossEntropyLoss-mean"]
    inputs = call.leaves(call.drawn(0))
    torch._dynamo.reset()
    total = torch.compile(call.total, backend="eager")(*inputs)
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(total, inputs[0], create_graph=True)


def test_a_loss_without_a_formula_names_the_way_out() -> None:
    class Bare(type(row_loss_class("cross_entropy")())):  # type: ignore[misc]
        of_logits = RowLoss.of_logits

    call = of_row_loss(Bare())
    function, at = over(call, constants(call.drawn(0)))
    with pytest.raises(NotImplementedError, match=r"Bare has no formula.*define its of_logits"):
        torch.func.grad(function)(*at)


def test_nothing_is_followed_here() -> None:
    """The kernels compute again once a transform is over, also if it failed."""
    call = CALLS["CrossEntropyLoss-mean"]
    inputs = call.leaves(call.drawn(0))

    def fails(*_: Any) -> Any:
        raise ValueError

    for transform in (torch.func.grad, torch.func.vmap):
        with pytest.raises(ValueError):
            transform(fails)(torch.ones(3))
    assert "LinearLoss" in type(call.outputs(*inputs)[0].grad_fn).__name__
