"""Fused linear cross entropy beyond the cases: memory, precision over many chunks, autocast, torch.compile, errors."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from liger_kernel import backends
from liger_kernel.backends.records import MIB
from liger_kernel.loss_head import fused_linear_cross_entropy as package
from liger_kernel.loss_head import library, loop
from liger_kernel.loss_head.fused_linear_cross_entropy import (
    LigerFusedLinearCrossEntropyFunction,
    fused_linear_cross_entropy,
    fused_linear_cross_entropy_backward,
    fused_linear_cross_entropy_forward,
    reference,
)
from liger_kernel.loss_head.losses.cross_entropy import CrossEntropyLoss
from liger_kernel.loss_head.plan import ChunkOptions, ChunkPlan
from liger_kernel.testing import Make, assert_no_worse

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(params=["reference", "triton"])
def implementation(request: pytest.FixtureRequest) -> Any:
    with backends.use_implementation(request.param):
        yield request.param


@pytest.fixture
def plain_implementation() -> Any:
    """Without kernels where a test is about the loop around them, and the interpreter would be slow."""
    with backends.use_implementation("reference" if DEVICE == "cpu" else None):
        yield


def drawn(
    n: int = 7, hidden: int = 16, classes: int = 50, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor]:
    make = Make(dtype, DEVICE)
    states = make.randn(n, hidden).requires_grad_()
    return (
        states,
        make.randn(classes, hidden, scale=0.3).requires_grad_(),
        make.labels(n, classes, 0.2),
    )


class Watch(TorchDispatchMode):
    """The sizes of all tensors made inside, and the matrix products run."""

    def __init__(self) -> None:
        super().__init__()
        self.made: list[int] = []
        self.products = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.products += func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm)
        known = {
            t.untyped_storage()._cdata
            for t in (*args, *(kwargs or {}).values())
            if isinstance(t, Tensor)
        }
        for t in result if isinstance(result, tuple | list) else (result,):
            if isinstance(t, Tensor) and t.untyped_storage()._cdata not in known:
                self.made.append(t.numel())
        return result


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_never_holds_all_logits(reduction: str, plain_implementation: None) -> None:
    n, hidden, classes, chunk = 24, 4, 104, 3
    states, weight, target = drawn(n, hidden, classes)
    with Watch() as watch:
        loss = fused_linear_cross_entropy(
            states, weight, target, reduction=reduction, label_smoothing=0.1, chunk_size=chunk
        )[0]
        loss.sum().backward()
    assert chunk * classes in watch.made  # the slab was seen
    assert max(watch.made) <= max(chunk * classes, classes * hidden)


def test_memory_follows_the_budget(plain_implementation: None) -> None:
    states, weight, target = drawn(64, 4, 104)
    largest = []
    for budget in (104 * 4, 8 * 104 * 4, 32 * 104 * 4):
        with Watch() as watch, torch.no_grad():
            fused_linear_cross_entropy(states, weight, target, memory_budget=budget)
        largest.append(max(watch.made) * 4)
        assert largest[-1] <= max(budget, weight.numel() * 4)
    assert largest == sorted(largest)
    assert largest[0] < largest[-1]


def test_frozen_tensors_cost_nothing(plain_implementation: None) -> None:
    """One product per chunk for the logits, and one more for each of hidden states and weight that asks."""
    states, weight, target = drawn(6, 30, 40)
    for needs_dx, needs_dw in itertools.product((False, True), repeat=2):
        states.requires_grad_(needs_dx)
        weight.requires_grad_(needs_dw)
        with Watch() as watch:
            loss = fused_linear_cross_entropy(states, weight, target, chunk_size=2)[0]
        assert watch.products == 3 * (1 + needs_dx + needs_dw)
        assert (weight.numel() in watch.made) == needs_dw
        assert loss.requires_grad == (needs_dx or needs_dw)
    with Watch() as watch, torch.no_grad():
        assert not fused_linear_cross_entropy(states, weight, target, chunk_size=2)[0].requires_grad
    assert watch.products == 3


def test_backward_of_one_keeps_the_buffers_and_the_numbers(implementation: str) -> None:
    states, weight, target = drawn()
    loss = fused_linear_cross_entropy(states, weight, target, chunk_size=3)[0]
    with Watch() as watch:
        loss.backward()
    assert weight.numel() not in watch.made  # handed out, not copied
    scaled = fused_linear_cross_entropy(states, weight, target, chunk_size=3)[0] * 0.25
    with Watch() as kept:
        first = torch.autograd.grad(scaled, (states, weight), retain_graph=True)
    assert weight.numel() in kept.made  # a copy, for who asked for a second one
    with Watch() as watch:
        second = torch.autograd.grad(scaled, (states, weight))
    assert weight.numel() not in watch.made
    for once, *found in zip((states.grad, weight.grad), first, second, strict=True):
        assert once is not None
        assert all(torch.equal(got, once * 0.25) for got in found)
    with pytest.raises(RuntimeError, match="retain_graph=True"):
        torch.autograd.grad(scaled, (states, weight))


def test_error_does_not_grow_with_the_chunks(plain_implementation: None) -> None:
    """The weight's bf16 gradient against float64: at most 1.2 times the error of one chunk, however many there are."""
    n = 512
    states, weight, target = drawn(n, 64, 128, torch.bfloat16)
    exact = weight.detach().double().requires_grad_()
    truth = torch.nn.functional.cross_entropy(
        states.detach().double() @ exact.t(), target, ignore_index=-100
    )
    (truth,) = torch.autograd.grad(truth, exact)

    def error(chunks: int, **options: Any) -> float:
        loss = fused_linear_cross_entropy(
            states, weight, target, chunk_size=-(-n // chunks), **options
        )[0]
        (grad,) = torch.autograd.grad(loss, weight)
        return float((grad.double() - truth).square().mean().sqrt())

    one = error(1)
    errors = {chunks: error(chunks) / one for chunks in (2, 3, 4, 8, 16, 64)}
    assert max(errors.values()) <= 1.2, errors
    assert (
        error(64, accum_dtype=torch.bfloat16) > 2 * one
    )  # what the choice of the running sum's dtype avoids
    assert error(2, accum_dtype=torch.float32) <= 1.01 * one


def test_plan() -> None:
    """The rows per chunk that the measurements in the docstring of `ChunkSizes` name, and their limits."""

    def rows(n: int, hidden: int, classes: int, needs_dw: bool = True, **options: Any) -> int:
        weight = torch.empty(classes, hidden, dtype=torch.bfloat16, device="meta")
        return ChunkPlan.of(n, weight, torch.bfloat16, ChunkOptions(**options), needs_dw).rows

    assert rows(8192, 4096, 128256, needs_dw=False) == 2048
    assert rows(16384, 2048, 151936) == 2048
    assert rows(8192, 4096, 32000) == 4096
    assert rows(4096, 2304, 256000, needs_dw=False) == 2048
    assert rows(2048, 896, 151936) == 1024  # two chunks, not one
    assert rows(16384, 1024, 151936) == 2048
    # a sum in fp32 wants larger chunks than one in 16 bits
    assert rows(32768, 4096, 256000) == 2048
    assert rows(32768, 4096, 256000, accum_dtype=torch.bfloat16) == 1024
    assert rows(32768, 1024, 32000) == 4096
    assert rows(2**20, 4096, 128256) == 2048
    assert rows(10, 4096, 128256) == 10
    assert rows(2100, 4096, 128256) == 1280  # two even chunks, not 2048
    assert rows(0, 4096, 128256) == 1
    assert rows(8192, 4096, 128256, chunk_size=17) == 17
    # two large chunks instead of a running sum in fp32, where that is smaller
    assert rows(8192, 4096, 128256) == 4096
    assert rows(8192, 4096, 128256, accum_dtype=torch.bfloat16) == 2048
    assert rows(4096, 2304, 256000) == 2048
    for budget in (2**19, 50 * MIB, 300 * MIB):
        chosen = rows(8192, 4096, 128256, memory_budget=budget, accum_dtype=torch.float32)
        assert chosen * 128256 * 2 <= budget < 2 * (chosen + 256) * 128256 * 2
    with pytest.raises(ValueError, match=r"memory_budget=1000 .* 256512 bytes"):
        rows(8192, 4096, 128256, memory_budget=1000)


@pytest.mark.parametrize("shape", [(8192, 4096, 128256), (16384, 2048, 32000), (65536, 1024, 512)])
def test_more_budget_never_means_less_memory(shape: tuple[int, int, int]) -> None:
    n, hidden, classes = shape
    weight = torch.empty(classes, hidden, dtype=torch.bfloat16, device="meta")
    seen = []
    for exponent in range(18, 33):
        options = ChunkOptions(memory_budget=2**exponent)
        rows = ChunkPlan.of(n, weight, torch.bfloat16, options, needs_dw=True).rows
        slab, sum_bytes = 2 * rows * classes, (2 if n <= 2 * rows else 4) * weight.numel()
        seen.append(max(sum_bytes + slab, (sum_bytes + 2 * weight.numel()) * (n > 2 * rows)))
    assert seen == sorted(seen)
    assert seen[0] < seen[-1]


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_autocast(reduction: str, implementation: str) -> None:
    """Products in bf16, gradients in the parameters' fp32; under autocast eager does the same."""
    states, weight, target = drawn()
    bias = Make(torch.float32, DEVICE, seed=1).randn(50).requires_grad_()
    leaves = (states, weight, bias)
    options = {"reduction": reduction, "label_smoothing": 0.1}

    def run(function: Any, *tensors: Tensor, enabled: bool = True, **more: Any) -> list[Tensor]:
        with torch.autocast(DEVICE, torch.bfloat16, enabled=enabled):
            loss = function(tensors[0], tensors[1], target, tensors[2], **options, **more)[0]
        return [loss, *torch.autograd.grad(loss.sum(), tensors)]

    ours = run(fused_linear_cross_entropy, *leaves, chunk_size=3)
    low = run(reference.fused_linear_cross_entropy, *leaves)
    wide = [t.detach().double().requires_grad_() for t in leaves]
    high = run(reference.fused_linear_cross_entropy, *wide, enabled=False)
    for name, a, b, c in zip(("loss", "hidden", "weight", "bias"), ours, high, low, strict=True):
        assert a.dtype == torch.float32
        assert_no_worse(name, a, b, c)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_float16_keeps_the_gradients_of_unlikely_classes(
    reduction: str, plain_implementation: None
) -> None:
    """Against eager under a gradient scaler, which multiplies the loss before it gets small."""
    states, weight, target = drawn(5000, 8, 8000)
    with torch.no_grad():
        weight.mul_(0.1)  # every class about as likely as any other

    def gradients(function: Any, scale: float, low: bool) -> list[Tensor]:
        args = [t.detach().to(torch.float32 if low else torch.float64) for t in (states, weight)]
        leaves = [t.requires_grad_() for t in args]
        with torch.autocast(DEVICE, torch.float16, enabled=low):
            loss = function(*leaves, target, reduction=reduction)[0]
        return [g / scale for g in torch.autograd.grad(loss * scale, leaves)]

    def eager(x: Tensor, w: Tensor, y: Tensor, reduction: str) -> tuple[Tensor]:
        logits = torch.nn.functional.linear(x, w)
        wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return (torch.nn.functional.cross_entropy(wide, y, reduction=reduction),)

    high = gradients(eager, 1.0, low=False)
    low = gradients(eager, 2.0**14 if reduction == "mean" else 16.0, low=True)
    ours = gradients(fused_linear_cross_entropy, 2.0**14, low=True)
    for name, *found in zip(("hidden", "weight"), ours, high, low, strict=True):
        assert_no_worse(name, *found)


def test_autocast_takes_mixed_dtypes(plain_implementation: None) -> None:
    states, weight, target = drawn()
    half = states.detach().bfloat16().requires_grad_()
    with pytest.raises(TypeError, match=r"bfloat16.*float32"):
        fused_linear_cross_entropy(half, weight, target)
    with torch.autocast(DEVICE, torch.bfloat16):
        fused_linear_cross_entropy(half, weight, target)[0].backward()
    assert half.grad is not None
    assert half.grad.dtype == torch.bfloat16
    assert weight.grad is not None
    assert weight.grad.dtype == torch.float32


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_compiles_to_one_graph(
    reduction: str, monkeypatch: pytest.MonkeyPatch, plain_implementation: None
) -> None:
    chunked = []
    run = loop.run
    monkeypatch.setattr(loop, "run", lambda *a: (chunked.append(a[4].chunk_size), run(*a))[1])
    states, weight, target = drawn()
    function = torch.compile(fused_linear_cross_entropy, fullgraph=True, backend="aot_eager")
    options = {
        "reduction": reduction,
        "chunk_size": 3,
        "softcap": 5.0,
        "return_predicted_tokens": True,
    }
    for needs_dw in (True, False):
        weight.requires_grad_(needs_dw)
        leaves = (states, weight) if needs_dw else (states,)
        chunked.clear()
        outputs = function(states, weight, target, **options)
        assert chunked == [3]  # the loop ran, at run time: nothing of it was traced
        plain = fused_linear_cross_entropy(states, weight, target, **options)
        upstream = torch.rand_like(outputs[0])
        grads = torch.autograd.grad(outputs[0], leaves, upstream)
        for a, b in zip(
            (outputs[0], outputs[3], *grads),
            (plain[0], plain[3], *torch.autograd.grad(plain[0], leaves, upstream)),
            strict=True,
        ):
            assert torch.equal(a, b)
        assert outputs[1] is None
        assert outputs[2] is None
    with torch.no_grad():
        assert torch.equal(function(states, weight, target, **options)[0], plain[0])


def test_compiles_under_autocast(plain_implementation: None) -> None:
    states, weight, target = drawn()

    def loss() -> Tensor:
        with torch.autocast(DEVICE, torch.bfloat16):
            return fused_linear_cross_entropy(states, weight, target, chunk_size=3)[0]

    found = torch.compile(loss, fullgraph=True, backend="aot_eager")()
    assert torch.equal(found, loss())
    assert torch.autograd.grad(found, weight)[0].dtype == torch.float32


@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_custom_op(reduction: str, plain_implementation: None) -> None:
    states, weight, target = drawn()
    bias = torch.zeros(50, device=DEVICE, requires_grad=True)
    low_rank = torch.rand(7, 3, device=DEVICE), torch.rand(50, 3, device=DEVICE)
    loss = CrossEntropyLoss(-100, 1e-3, 0.1, reduction, None, True, True, True, True)
    options = (*library._encoded(loss), torch.float32, None, None, 3, None)
    rest = (target, None, *(None,) * 3, None)  # no class weights, no teacher, no scale of rows
    for needs, low in ([True] * 5, low_rank), ([False] * 5, (None, None)):
        tensors = [t.detach().requires_grad_(any(needs)) for t in (states, weight, bias)]
        low = [t if t is None else t.requires_grad_() for t in low]
        torch.library.opcheck(library._op, (*tensors, *low, *rest, needs, *options))


def test_frameworks_may_wrap_the_helpers(
    monkeypatch: pytest.MonkeyPatch, plain_implementation: None
) -> None:
    called = []
    for name in ("fused_linear_cross_entropy_forward", "fused_linear_cross_entropy_backward"):
        inner = getattr(package, name)
        monkeypatch.setattr(
            package, name, lambda *a, _n=name, _f=inner, **k: (called.append(_n), _f(*a, **k))[1]
        )
    states, weight, target = drawn()
    LigerFusedLinearCrossEntropyFunction.apply(states, weight, target)[0].backward()
    assert [name.rpartition("_")[2] for name in called] == ["forward", "backward"]


def test_legacy_functions(plain_implementation: None) -> None:
    states, weight, target = drawn()
    args = (None, None, -100, 1e-4, 0.1, "sum", 30.0, True, None, False, True, True)
    loss, z_loss, accuracy, predicted = LigerFusedLinearCrossEntropyFunction.apply(
        states, weight, target, *args
    )
    expected = torch.autograd.grad(loss, (states, weight))
    for more in ({}, {"compute_gradients": True, "weight_requires_grad": True}):
        *outputs, dx, dw, db = fused_linear_cross_entropy_forward(
            states, weight, target, *args, **more
        )
        for a, b in zip(outputs, (loss, z_loss, accuracy, predicted), strict=True):
            assert torch.equal(a, b)
        assert torch.equal(dx, expected[0])
        assert torch.equal(dw, expected[1])
        assert db is None
    scaled = fused_linear_cross_entropy_backward(torch.tensor(2.0, device=DEVICE), dx, dw, None)
    assert torch.equal(scaled[0], 2 * expected[0])
    assert scaled[2] is None
    assert (
        fused_linear_cross_entropy_forward(states, weight, target, compute_gradients=False)[4:]
        == (None,) * 3
    )
    # the positional tail of 0.8.5: ce_impl, ce_mode, chunk_mem_const
    tail = LigerFusedLinearCrossEntropyFunction.apply(states, weight, target, *args, None, None, 2)
    assert_no_worse("chunk_mem_const", tail[0], loss.double(), loss)
    for wrong in (0, True, 1.5):
        with pytest.raises(ValueError, match="chunk_mem_const must be a positive integer"):
            LigerFusedLinearCrossEntropyFunction.apply(
                states, weight, target, *args, None, None, wrong
            )
    with pytest.raises(ValueError, match="ce_impl='cutile'"):
        LigerFusedLinearCrossEntropyFunction.apply(states, weight, target, *args, "cutile")


def test_arguments_are_checked(plain_implementation: None) -> None:
    states, weight, target = drawn()
    wide = torch.ones(3, 2, 16, device=DEVICE)
    for error, words, change in (
        (ValueError, r"\(3, 2, 16\).*\(7,\)", {"hidden": wide}),
        (ValueError, r"\(7, 16\).*\(6,\)", {"target": target[:6]}),
        (ValueError, r"\(16, 50\).*16 wide", {"weight": weight.detach().t()}),
        (ValueError, r"bias.*\(49,\).*50", {"bias": torch.ones(49, device=DEVICE)}),
        (ValueError, r"class_weight.*\(7,\).*50", {"class_weight": torch.ones(7, device=DEVICE)}),
        (ValueError, "'avg'.*'mean'", {"reduction": "avg"}),
        (ValueError, "softcap=-1", {"softcap": -1.0}),
        (ValueError, "chunk_size=0", {"chunk_size": 0}),
        (ValueError, "chunk_size=2 and memory_budget=900", {"chunk_size": 2, "memory_budget": 900}),
        (TypeError, "accum_dtype=torch.int32", {"accum_dtype": torch.int32}),
        (TypeError, "float64.*float32", {"hidden": states.detach().double()}),
    ):
        with pytest.raises(error, match=words):
            fused_linear_cross_entropy(
                **{"hidden": states, "weight": weight, "target": target, **change}
            )
    if DEVICE == "cpu":
        with pytest.raises(IndexError, match="target 50 is out of bounds for 50 classes"):
            fused_linear_cross_entropy(states, weight, torch.full_like(target, 50))
