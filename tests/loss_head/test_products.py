"""Heads whose number of classes is no multiple of 8: products in two parts over padded rows, here on the CPU, too."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

from liger_kernel import backends
from liger_kernel.backends.records import DeviceFacts
from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss
from liger_kernel.loss_head import products
from liger_kernel.loss_head.fused_linear_cross_entropy import fused_linear_cross_entropy
from liger_kernel.loss_head.fused_linear_cross_entropy.cases import SPEC
from liger_kernel.loss_head.products import HeadInputs, HeadProducts, has_mixed_product, slab_width
from liger_kernel.ops.cross_entropy import portable
from liger_kernel.ops.cross_entropy import triton as kernels
from liger_kernel.ops.cross_entropy.contract import CrossEntropyOptions, CrossEntropyRows, Totals
from liger_kernel.testing import Make, OpCase, assert_no_worse
from liger_kernel.testing.calls import assert_as_exact, drawn

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SMALL = [case for case in SPEC.cases if not case.large]
ODD = [case for case in SMALL if case.inputs(Make(torch.float32))[1].shape[0] % 8]  # type: ignore[union-attr]
PARTED = [case for case in ODD if case.inputs(Make(torch.float32))[3] is None]


def force_multiple(monkeypatch: pytest.MonkeyPatch, multiple: int) -> None:
    """Every device is slow unless the classes of a head are a multiple of that."""

    def facts_of(device: torch.device) -> DeviceFacts:
        return replace(backends.facts_of(device), product_multiple=multiple)

    monkeypatch.setattr(products, "facts_of", facts_of)


@pytest.fixture
def padded(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Padded slabs on every device."""
    force_multiple(monkeypatch, 8)
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
    options = CrossEntropyOptions(
        label_smoothing=0.1,
        softcap=5.0,
        lse_square_scale=1e-3,
        return_z_loss=True,
        return_token_accuracy=True,
        return_predicted_tokens=True,
    )
    totals = Totals.of(target, weight, options)

    def stepped(step: Any, x: torch.Tensor, grad: torch.Tensor, padded: bool) -> CrossEntropyRows:
        out = CrossEntropyRows.empty(target, torch.float32, options)
        more = {"grad": grad, "row_scale": None, "padded": padded}
        step(x, target, weight, totals=totals, options=options, out=out, **more)
        return out

    found = []
    for width in (classes, -(-classes // 64) * 64):
        memory = torch.full((5, width), torch.nan, dtype=dtype, device=DEVICE)
        x = memory[:, :classes]
        x.copy_(logits)
        out = stepped(kernels.step, x, x, width != classes)
        found.append((x, *out.columns))
    beyond = memory[:, classes : -(-classes // 16) * 16]
    assert not beyond[target >= 0].any()
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    plain = torch.empty_like(logits)
    stepped(portable.step, logits, plain, True)
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


def head_of(weight: torch.Tensor, bias: torch.Tensor | None = None) -> HeadProducts:
    return HeadProducts(HeadInputs(weight[:4], weight, bias, weight.dtype))


def test_heads_are_parted_where_a_sum_of_both_is_rounded_once() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        weight = Make(dtype, DEVICE).randn(77, 8)
        mixed = has_mixed_product(weight.device, dtype)
        parted = DEVICE == "cuda" and (dtype == torch.float32 or mixed)
        head = head_of(weight)
        assert len(head.parts) == 1 + parted
        assert head.width == (128 if parted else 77)
        assert head.is_padded == parted
        with pytest.MonkeyPatch.context() as patch:
            for multiple in (1, 7, 8):  # that of 77 classes, and of a device that does not ask
                force_multiple(patch, multiple)
                wide = dtype == torch.float32 or mixed
                assert len(head_of(weight).parts) == 1 + (wide and multiple == 8)
        assert len(head_of(weight[:72]).parts) == 1
        assert len(head_of(weight, weight[:, 0]).parts) == 1
        assert len(head_of(weight[:5]).parts) == 1
    assert slab_width(weight) == (128 if DEVICE == "cuda" else 77)
