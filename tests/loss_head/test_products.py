"""Heads whose number of classes is no multiple of 8: products in two parts over padded rows, here on the CPU, too."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from liger_kernel.ops.cross_entropy.rows import Options, Rows, Totals

from liger_kernel import backends
from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss
from liger_kernel.loss_head.fused_linear_cross_entropy import fused_linear_cross_entropy, products
from liger_kernel.loss_head.fused_linear_cross_entropy.cases import SPEC
from liger_kernel.loss_head.products import slab_width
from liger_kernel.ops.cross_entropy import rows
from liger_kernel.ops.cross_entropy import triton as kernels
from liger_kernel.testing import Make, OpCase, assert_no_worse
from liger_kernel.testing.calls import assert_as_exact, drawn

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SMALL = [case for case in SPEC.cases if not case.large]
ODD = [case for case in SMALL if case.inputs(Make(torch.float32))[1].shape[0] % 8]  # type: ignore[union-attr]
PARTED = [case for case in ODD if case.inputs(Make(torch.float32))[3] is None]


@pytest.fixture
def padded(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Padded slabs on every device."""

    def width(weight: torch.Tensor) -> int:
        n_classes = weight.shape[0]
        return n_classes if n_classes % 8 == 0 else -(-n_classes // 64) * 64

    monkeypatch.setattr(products, "slab_width", width)
    with backends.use_implementation("triton"):
        yield


def test_the_cases_have_odd_heads() -> None:
    assert len(PARTED) > 6
    assert len(ODD) > len(PARTED)  # those with a bias are not parted


@pytest.mark.parametrize("case", ODD, ids=lambda case: case.id)
def test_as_exact_in_two_parts(case: OpCase, padded: None) -> None:
    assert_as_exact(SPEC, case, *drawn(SPEC, case, Make(torch.float32, DEVICE)))


@pytest.mark.parametrize("far", [0.0, 300.0])
def test_what_lies_beyond_the_classes_counts_for_nothing(far: float, padded: None) -> None:
    """Logits of -300 make exp(0 - top) infinite, and infinity times the zeros of the padding NaN."""
    make = Make(torch.float32, DEVICE)
    states, weight, target = make.randn(6, 8), make.randn(13, 8), make.labels(6, 13, 0.3)
    states[:, 0], weight[:, 0] = far, -1
    leaf = states.requires_grad_()
    loss = fused_linear_cross_entropy(leaf, weight, target)[0]
    (grad,) = torch.autograd.grad(loss, leaf)
    exact = states.detach().double().requires_grad_()
    high = torch.nn.functional.cross_entropy(exact @ weight.double().t(), target)
    low = torch.nn.functional.cross_entropy(leaf @ weight.t(), target)
    assert_no_worse("loss", loss, high, low)
    assert_no_worse(
        "gradient", grad, torch.autograd.grad(high, exact)[0], torch.autograd.grad(low, leaf)[0]
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("classes", [77, 3, 16384 + 77])
def test_padded_rows_give_the_same_bits(classes: int, dtype: torch.dtype) -> None:
    make = Make(dtype, DEVICE)
    logits, target = make.randn(5, classes, scale=3), make.labels(5, classes, 0.3)
    weight = make.randn(classes).abs() + 0.1
    options = Options(label_smoothing=0.1, softcap=5.0, lse_square_scale=1e-3)
    totals = Totals.of(target, weight, options, True)
    found = []
    for width in (classes, -(-classes // 64) * 64):
        memory = torch.full((5, width), torch.nan, dtype=dtype, device=DEVICE)
        x = memory[:, :classes]
        x.copy_(logits)
        out = Rows.empty(target, torch.float32, True, True, True)
        kernels.step(x, target, weight, totals, options, out, x, None, width != classes)
        found.append((x, out.loss, out.z_loss, out.accuracy, out.predicted))
    beyond = memory[:, classes : -(-classes // 16) * 16]
    assert not beyond[target >= 0].any()
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    plain = torch.empty_like(logits)
    rows.step(logits, target, weight, totals, options, out, plain, padded=True)
    assert plain.isfinite().all()


def test_distillation_in_two_parts(padded: None, monkeypatch: pytest.MonkeyPatch) -> None:
    make = Make(torch.float32, DEVICE)
    drawn = (make.randn(7, 8), make.randn(77, 8), make.randn(7, 12), make.randn(77, 12))
    labels = make.labels(7, 77, 0.3)

    def run(dtype: torch.dtype) -> list[torch.Tensor]:
        tensors = [t.to(dtype) for t in drawn]
        asking = [t.requires_grad_() for t in tensors[:2]]
        loss = LigerFusedLinearJSDLoss(chunk_size=3)(*tensors, labels)
        return [loss.detach(), *torch.autograd.grad(loss, asking)]

    ours = run(torch.float32)
    monkeypatch.undo()
    with backends.use_implementation("reference"):
        high, low = run(torch.float64), run(torch.float32)
    for name, a, b, c in zip(("loss", "hidden", "weight"), ours, high, low, strict=True):
        assert_no_worse(name, a, b, c)


def test_heads_are_parted_where_a_sum_of_both_is_rounded_once() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        weight = Make(dtype, DEVICE).randn(77, 8)
        parted = DEVICE == "cuda" and (dtype == torch.float32 or has_mixed_gemm(weight))
        head = Head(weight, None, may_pad=True)
        assert len(head.parts) == 1 + parted
        assert head.width == (128 if parted else 77)
        assert len(Head(weight, None, may_pad=False).parts) == 1
        assert len(Head(weight[:72], None, may_pad=True).parts) == 1
        assert len(Head(weight, weight[:, 0], may_pad=True).parts) == 1
        assert len(Head(weight[:5], None, may_pad=True).parts) == 1
    assert slab_width(weight) == (128 if DEVICE == "cuda" else 77)
