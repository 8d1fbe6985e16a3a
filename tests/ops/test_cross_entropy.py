"""Cross entropy beyond the cases: what must raise, what must not be computed, and what happens under torch.compile."""

from __future__ import annotations

import functools
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from liger_kernel import backends
from liger_kernel.ops.cross_entropy import (
    LigerCrossEntropyFunction,
    cross_entropy,
    cross_entropy_backward,
    cross_entropy_forward,
    portable,
    reference,
)
from liger_kernel.ops.cross_entropy import triton as kernels
from liger_kernel.ops.cross_entropy.contract import CrossEntropyOptions, CrossEntropyRows, Totals
from liger_kernel.ops.scale_gradients import portable as portable_scaling
from liger_kernel.ops.scale_gradients import scale_gradients
from liger_kernel.ops.scale_gradients import triton as scaling
from liger_kernel.testing import Make, assert_no_worse

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(params=["reference", "triton"], autouse=True)
def implementation(request: pytest.FixtureRequest) -> object:
    with backends.use_implementation(request.param):
        yield request.param


def drawn(
    n: int = 5, classes: int = 40, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    make = Make(dtype, DEVICE)
    return make.randn(n, classes, scale=3).requires_grad_(), make.labels(n, classes, 0.2)


def stepped(
    step: Any, logits: Tensor, target: Tensor, options: CrossEntropyOptions, grad: Tensor
) -> CrossEntropyRows:
    """What one step says of the rows; their gradient goes to `grad`."""
    out = CrossEntropyRows.empty(target, logits.dtype, options)
    totals = Totals.of(target, None, options)
    more: dict[str, Any] = {"grad": grad, "row_scale": None, "padded": False}
    step(logits, target, None, totals=totals, options=options, out=out, **more)
    return out


def test_agrees_with_torch() -> None:
    logits, target = drawn()
    weight = torch.rand(40, device=DEVICE) + 0.1
    for reduction in ("mean", "sum", "none"):
        options = {"weight": weight, "label_smoothing": 0.1, "reduction": reduction}
        ours = cross_entropy(logits, target, **options)[0]
        high, low = (
            torch.nn.functional.cross_entropy(
                x, target, **{**options, "weight": weight.to(x.dtype)}
            )
            for x in (logits.double(), logits)
        )
        assert_no_worse(reduction, ours, high, low)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gradient_of_a_certain_label_is_rounded_once(dtype: torch.dtype) -> None:
    """p - 1 for p near 1: rounding p first would give 0."""
    logits = torch.zeros(1, 64, dtype=dtype, device=DEVICE)
    logits[0, 3] = 12.0
    logits.requires_grad_()
    cross_entropy(logits, torch.tensor([3], device=DEVICE), reduction="sum")[0].backward()
    truth = torch.softmax(logits.detach().double(), -1)[0, 3] - 1
    assert logits.grad is not None
    error = (logits.grad[0, 3].double() - truth).abs() / truth.abs()
    assert logits.grad[0, 3] != 0
    assert error <= 2 * torch.finfo(dtype).eps


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_float16_keeps_the_gradients_of_unlikely_classes(reduction: str) -> None:
    """Against eager under a gradient scaler, which multiplies the loss, and so the gradients while they are in fp32."""
    make = Make(torch.float16, DEVICE)
    logits, target = make.randn(60, 20000, scale=0.1), make.labels(60, 20000, 0.2)
    scale = 2.0**14 if reduction == "mean" else 16.0

    def gradient(dtype: torch.dtype, function: Any) -> Tensor:
        leaf = logits.detach().clone().requires_grad_()
        loss = function(leaf if function is ours else leaf.to(dtype))
        return torch.autograd.grad(loss.to(torch.float32) * scale, leaf)[0].double() / scale

    def ours(x: Tensor) -> Tensor:
        return cross_entropy(x, target, reduction=reduction)[0]

    def eager(x: Tensor) -> Tensor:
        return torch.nn.functional.cross_entropy(x, target, reduction=reduction)

    exact = logits.double().requires_grad_()
    (high,) = torch.autograd.grad(eager(exact), exact)
    found, low = gradient(torch.float16, ours), gradient(torch.float32, eager)
    kept = high != 0
    shares = [(t[kept] / high[kept]) for t in (found, high, low)]
    assert_no_worse("share of the gradient", shares[0].half(), shares[1], shares[2].half())


@pytest.mark.parametrize("step", [portable.step, kernels.step], ids=["plain", "triton"])
def test_label_out_of_range_gives_nan(step: object) -> None:
    """On a GPU nobody checks the labels: such a row must not read outside of its logits, nor pass for a good one."""
    for label in (40, 2**40, -1):
        logits = Make(torch.float32, DEVICE).randn(3, 40)
        target = torch.tensor([1, label, -100], device=DEVICE)
        options = CrossEntropyOptions(
            return_z_loss=True, return_token_accuracy=True, return_predicted_tokens=True
        )
        grad = torch.empty_like(logits)
        out = stepped(step, logits, target, options, grad)
        assert out.loss.isnan().tolist() == [False, True, False]
        assert grad.isnan().any(1).tolist() == [False, True, False]
        accuracy = out.columns[2]
        assert accuracy is not None
        assert accuracy[1] == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_classes_masked_with_the_lowest_number(dtype: torch.dtype) -> None:
    """As HF masks them, and so many at the start of the row that the first block of the kernel holds nothing else.
    In the third row that is all of them: as likely as each other."""
    make = Make(dtype, DEVICE)
    logits = make.randn(3, 65_600, scale=3)
    logits[:, :65_536] = torch.finfo(dtype).min
    logits[2] = torch.finfo(dtype).min
    target = torch.tensor([65_540, 65_599, 7], device=DEVICE)

    def run(function: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        leaf = x.detach().requires_grad_()
        loss = function(leaf, target)
        loss = loss[0] if isinstance(loss, tuple) else loss
        return loss.detach(), torch.autograd.grad(loss, leaf)[0]

    low = run(lambda x, y: reference.cross_entropy(x, y)[0], logits)
    high = run(lambda x, y: reference.cross_entropy(x, y)[0], logits.double())
    assert high[0] > math.log(65_600) / 3
    for name, *found in zip(("loss", "logits"), run(cross_entropy, logits), high, low, strict=True):
        assert_no_worse(name, *found)


@pytest.mark.parametrize("step", [portable.step, kernels.step], ids=["plain", "triton"])
@pytest.mark.parametrize("z_scale", [0.0, 1e-9])
def test_rows_far_from_zero(step: Any, z_scale: float) -> None:
    """Beside a logit of 10^5, fp32 rounds the logsumexp to multiples of 1/128."""
    make = Make(torch.float32, DEVICE)
    logits = make.integers(3, 4, 400) + torch.tensor([[1e5], [-1e5], [2.0**17], [0.0]]).to(DEVICE)
    target = torch.tensor([3, 399, 0, 7], device=DEVICE)
    options = CrossEntropyOptions(lse_square_scale=z_scale, reduction="none")
    grad = torch.empty_like(logits)
    out = stepped(step, logits, target, options, grad)

    def exact(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        leaf = logits.to(dtype).requires_grad_()
        loss = reference.cross_entropy(leaf, target, lse_square_scale=z_scale, reduction="none")[0]
        return loss, torch.autograd.grad(loss.sum(), leaf)[0]

    high, low = exact(torch.float64), exact(torch.float32)
    by_torch = F.cross_entropy(logits.double(), target, reduction="none")
    wide = z_scale * logits.double().logsumexp(-1).square()
    assert_no_worse("the reference", low[0], by_torch + wide, high[0].float())
    assert_no_worse("loss", out.loss, high[0], low[0])
    assert_no_worse("gradient", grad, high[1], low[1])


def test_step_may_overwrite_its_logits(implementation: str) -> None:
    logits, target = drawn(6, 16384 + 70)
    step = kernels.step if implementation == "triton" else portable.step
    options = CrossEntropyOptions(label_smoothing=0.1, softcap=5.0, lse_square_scale=1e-3)
    found = []
    for in_place in (False, True):
        x = logits.detach().clone()
        grad = x if in_place else torch.empty_like(x)
        stepped(step, x, target, options, grad)
        found.append(grad)
    assert torch.equal(*found)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layout", ["randn", "strided", "transposed", "expanded"])
def test_in_place_gives_the_same_bits(layout: str, dtype: torch.dtype) -> None:
    make = Make(dtype, DEVICE)
    drawn, target = getattr(make, layout)(6, 70, scale=3.0), make.labels(6, 70, 0.2)
    found = []
    for in_place in (False, True):
        logits = drawn.detach().clone(memory_format=torch.preserve_format)
        logits = drawn[:1].clone().expand(6, 70) if layout == "expanded" else logits
        x = logits.requires_grad_() * 1  # not a leaf
        loss, *_ = cross_entropy(x, target, label_smoothing=0.1, in_place=in_place)
        (grad,) = torch.autograd.grad(loss * 0.5, x)
        found.append((loss, grad))
    assert torch.equal(found[0][0], found[1][0])
    assert torch.equal(found[0][1], found[1][1])


def test_in_place_takes_no_memory() -> None:
    logits, target = drawn()
    before = logits.detach().clone()
    with torch.no_grad():
        cross_entropy(logits, target, in_place=True)
    assert torch.equal(logits, before)  # no gradient, so nothing that could take its place
    (grad,) = torch.autograd.grad(cross_entropy(logits, target, in_place=True)[0], logits)
    assert grad.data_ptr() == logits.data_ptr()
    assert not torch.equal(logits, before)


def test_in_place_leaves_rows_alone_that_share_memory() -> None:
    row = drawn()[0][:1].detach()
    before = row.clone()
    logits = row.expand(5, 40).requires_grad_()
    torch.autograd.grad(
        cross_entropy(logits, drawn()[1], reduction="sum", in_place=True)[0], logits
    )
    assert torch.equal(row, before)


def test_in_place_is_refused_to_who_needs_the_logits() -> None:
    logits, target = drawn()
    with pytest.raises(ValueError, match='in_place=True with reduction="none"'):
        cross_entropy(logits, target, reduction="none", in_place=True)
    saved = logits.exp()  # whose backward reads it
    loss, *_ = cross_entropy(saved, target, in_place=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_backward_scales_each_time() -> None:
    logits, target = drawn()
    unit, scaled = (cross_entropy(logits, target)[0] for _ in range(2))
    (once,) = torch.autograd.grad(unit, logits)
    (half,) = torch.autograd.grad(scaled * 0.5, logits, retain_graph=True)
    assert torch.equal(half, once * 0.5)
    (again,) = torch.autograd.grad(scaled, logits)
    assert torch.equal(again, once)
    assert torch.equal(half, once * 0.5)
    with pytest.raises(RuntimeError, match="retain_graph=True"):
        torch.autograd.grad(scaled, logits)


def test_none_can_go_backward_twice() -> None:
    logits, target = drawn()
    loss = cross_entropy(logits, target, reduction="none")[0]
    first, second = (
        torch.autograd.grad(loss.sum(), logits, retain_graph=True)[0] for _ in range(2)
    )
    assert torch.equal(first, second)


def test_no_gradient_under_no_grad(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    plain = kernels.step

    @functools.wraps(plain)  # it still has the parameters of the contract
    def asking(*tensors: Tensor | None, **options: Any) -> None:
        asked.append(options["grad"])
        plain(*tensors, **options)

    monkeypatch.setattr(kernels, "step", asking)
    logits, target = drawn()
    with torch.no_grad(), backends.use_implementation("triton"):
        assert not cross_entropy(logits, target)[0].requires_grad
    assert asked == [None]


def test_only_the_loss_carries_a_gradient() -> None:
    logits, target = drawn()
    outputs = cross_entropy(logits, target, None, -100, 1e-3, 0.0, "mean", None, True, True, True)
    assert [o is not None and o.requires_grad for o in outputs] == [True, False, False, False]


def test_labels_of_any_integer_dtype() -> None:
    logits, target = drawn()
    expected = cross_entropy(logits, target)[0]
    for dtype in (torch.int8, torch.int16, torch.int32):
        assert torch.equal(cross_entropy(logits, target.to(dtype))[0], expected)


def test_compiles_to_one_graph(implementation: str) -> None:
    """Kernels that were asked for by name stay outside of it, and one graph is then refused."""
    logits, target = drawn()
    options = {"label_smoothing": 0.1, "softcap": 5.0, "return_token_accuracy": True}
    whole = torch.compile(cross_entropy, fullgraph=True, backend="aot_eager")
    compiled = whole
    if implementation == "triton":
        with pytest.raises(Exception, match="_outside_the_graph"):
            whole(logits, target, **options)
        with backends.use_implementation(None):
            assert torch.autograd.grad(whole(logits, target, **options)[0], logits)
        compiled = torch.compile(cross_entropy, backend="aot_eager")
    ours, plain = compiled(logits, target, **options), cross_entropy(logits, target, **options)
    with backends.use_implementation("reference"):
        high = cross_entropy(logits.double(), target, **options)[0]
    assert_no_worse("loss", ours[0], high, plain[0])
    assert torch.equal(ours[2], plain[2])
    assert torch.autograd.grad(ours[0], logits)[0].isfinite().all()


def test_arguments_are_checked() -> None:
    logits, target = drawn()
    for error, words, change in (
        (ValueError, r"\(5, 40\).*\(4,\)", {"target": target[:4]}),
        (ValueError, r"\(5, 8, 5\)", {"logits": logits.detach().view(5, 8, 5)}),
        (ValueError, "'avg'.*'mean', 'sum', 'none'", {"reduction": "avg"}),
        (ValueError, "label_smoothing=1.5", {"label_smoothing": 1.5}),
        (ValueError, "softcap=0", {"softcap": 0.0}),
        (ValueError, r"weight.*\(39,\).*40", {"weight": torch.ones(39, device=DEVICE)}),
        (TypeError, "weight.*int64", {"weight": torch.ones(40, dtype=torch.int64, device=DEVICE)}),
        (TypeError, "target.*float32", {"target": target.float()}),
        (TypeError, "logits.*int64", {"logits": torch.ones(5, 40, dtype=torch.int64)}),
    ):
        with pytest.raises(error, match=words):
            cross_entropy(**{"logits": logits, "target": target, **change})


@pytest.mark.skipif(DEVICE != "cpu", reason="checked where it needs no synchronisation")
def test_label_out_of_range_raises_on_the_cpu() -> None:
    logits, target = drawn()
    for wrong in (40, -1):
        with pytest.raises(IndexError, match=f"target {wrong} is out of bounds for 40 classes"):
            cross_entropy(logits, torch.full_like(target, wrong))
    assert cross_entropy(logits, torch.full_like(target, -1), ignore_index=-1)[0] == 0


def test_legacy_functions() -> None:
    logits, target = drawn()
    loss, z_loss, accuracy, predicted = LigerCrossEntropyFunction.apply(
        logits, target, None, -100, 1e-4, 0.1, "sum", 30.0, True, False, False
    )
    (grad,) = torch.autograd.grad(loss, logits)
    assert z_loss is not None
    assert accuracy is None
    assert predicted is None
    *again, made = cross_entropy_forward(logits, target, None, -100, 1e-4, 0.1, "sum", 30.0, True)
    assert torch.equal(again[0], loss)
    assert torch.equal(made, grad)
    assert torch.equal(cross_entropy_backward(made, torch.tensor(2.0)), 2 * grad)
    per_row = torch.arange(5.0, device=DEVICE)
    assert torch.equal(cross_entropy_backward(made, per_row), per_row[:, None] * grad)
    assert cross_entropy_forward(logits.detach(), target)[4] is None


def test_scaling_kernel() -> None:
    """Three buffers of other sizes in one launch; a factor of 1 leaves every bit."""
    make = Make(torch.float32, DEVICE)
    buffers = [make.randn(3, 5), make.randn(9000), make.randn(2)]
    before = [b.clone() for b in buffers]
    for name, scale_ in (("reference", portable_scaling.scale_), ("triton", scaling.scale_)):
        for factor in (1.0, 0.25):
            scale_(buffers, torch.tensor(factor, device=DEVICE))
            before = [b * factor for b in before]
            assert all(torch.equal(a, b) for a, b in zip(buffers, before, strict=True))
        some = (None, buffers[2], torch.empty(0, device=DEVICE))
        with backends.use_implementation(name):
            scale_gradients(some, torch.tensor(2.0, device=DEVICE))
        before[2] *= 2
        assert torch.equal(buffers[2], before[2])
