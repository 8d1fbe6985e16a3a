"""The linear divergences, and cross entropy with total variation distance: their helpers, modules and refusals."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
from torch import Tensor

from liger_kernel import ops
from liger_kernel.backends import use_implementation
from liger_kernel.functional import fused_ce_tvd, fused_linear_jsd, fused_linear_kl_div
from liger_kernel.loss_head.label_count import LabelCount
from liger_kernel.testing import Make, assert_no_worse
from liger_kernel.transformers import (
    LigerFusedCETVDLoss,
    LigerFusedLinearJSD,
    LigerFusedLinearKLDivLoss,
)
from liger_kernel.transformers import functional as F


def heads() -> list[Tensor]:
    """Hidden states and weight of the student, and of the teacher."""
    make = Make(torch.float32)
    return [make.randn(*shape) for shape in ((5, 8), (12, 8), (5, 6), (12, 6))]


LABELS = torch.tensor([1, -7, 3, -7, 99])  # which of them count is all that is read


def gradients(loss: Tensor, *leaves: Tensor) -> list[Tensor]:
    return [loss.detach(), *torch.autograd.grad(loss.sum(), leaves)]


def assert_equal(found: Any, expected: Any) -> None:
    for a, b in zip(found, expected, strict=True):
        assert a is b is None or torch.equal(a, b)


def test_jsd_by_every_door() -> None:
    x, w, *teacher = heads()
    x.requires_grad_(), w.requires_grad_()
    options = {"jsd_beta": 0.3, "ignore_index": -7, "temperature": 2.0}
    expected = gradients(fused_linear_jsd(x, w, *teacher, LABELS, **options), x, w)
    module = LigerFusedLinearJSD(**options)
    path = importlib.import_module("liger_kernel.transformers.fused_linear_jsd")
    assert path.LigerFusedLinearJSD is LigerFusedLinearJSD
    for door in (module, lambda *given: F.liger_fused_linear_jsd(*given, **options)):
        assert_equal(gradients(door(x, w, *teacher, LABELS), x, w), expected)
    given = (x, w, *teacher, LABELS, 0.3, -7, True, 2.0)
    assert_equal(ops.fused_linear_jsd_forward(*given), expected)
    assert_equal(ops.fused_linear_jsd_forward(x, w.detach(), *given[2:]), [*expected[:2], None])
    half = ops.fused_linear_jsd_backward(torch.tensor(0.5), *expected[1:])
    assert_equal(half, [0.5 * g for g in expected[1:]])
    everything = fused_linear_jsd(x, w, *teacher, None, **options)
    assert torch.equal(
        ops.fused_linear_jsd_forward(*given[:5], 0.3, -7, False, 2.0)[0], everything.detach()
    )
    counted = fused_linear_jsd(
        x, w, *teacher, LABELS, label_count=LabelCount(LABELS, -7), **options
    )
    assert_equal(gradients(counted, x, w), expected)


def test_kl_div_by_every_door() -> None:
    x, w, _, _ = heads()
    x.requires_grad_(), w.requires_grad_()
    p = torch.randn(5, 12, generator=torch.Generator().manual_seed(0)).softmax(-1)
    options: dict[str, Any] = {
        "reduction": "mean",
        "ignore_index": -7,
        "temperature": 2.0,
        "eps": 1e-3,
    }
    expected = gradients(fused_linear_kl_div(x, w, p, LABELS, **options), x, w)
    module = LigerFusedLinearKLDivLoss(**options)
    for door in (module, lambda *given: F.liger_fused_linear_kl_div(*given, **options)):
        assert_equal(gradients(door(x, w, p, LABELS), x, w), expected)
    found = ops.fused_linear_kl_div_forward(x, w, p, LABELS, "mean", -7, True, 2.0, 1e-3)
    assert_equal(found, expected)
    half = ops.fused_linear_kl_div_backward(torch.tensor(0.5), *expected[1:])
    assert_equal(half, [0.5 * g for g in expected[1:]])


@pytest.mark.usefixtures("on_the_kernels_device")
@pytest.mark.parametrize("ce_counts", [True, False])
def test_ce_tvd_by_every_door(ce_counts: bool) -> None:
    make = Make(torch.float32)
    x, y, target = make.randn(5, 33).requires_grad_(), make.randn(5, 33), make.labels(5, 33, 0.3)
    weights = torch.arange(5.0) * ce_counts, torch.arange(5.0) - 2
    with use_implementation("triton"):
        ce, tvd = fused_ce_tvd(x, y, target)
        loss = (ce * weights[0]).sum() * ce_counts + (tvd * weights[1]).sum()
        if not ce_counts:  # nobody uses it
            loss = (tvd * weights[1]).sum()
        expected = torch.autograd.grad(loss, x, retain_graph=True)[0]
        assert_equal(LigerFusedCETVDLoss()(x, y, target), (ce, tvd))
        *found, lse, t_lse, sigma = ops.fused_ce_tvd_forward(x, y, target, -100)
        assert_equal(found, (ce, tvd))
        grad = ops.fused_ce_tvd_backward(*weights, x, y, target, lse, t_lse, sigma, -100)
        assert torch.allclose(grad, expected)
    kept = target != -100
    assert torch.allclose(lse[kept], x[kept].logsumexp(-1))
    low, high = (
        (t.softmax(-1) * (t.softmax(-1) - o.softmax(-1)).sign()).sum(-1)[kept].detach()
        for t, o in ((x, y), (x.double(), y.double()))
    )
    assert_no_worse("sigma", sigma[kept], high, low)


@pytest.mark.usefixtures("on_the_kernels_device")
def test_where_both_agree_nothing_pulls() -> None:
    x = heads()[0].requires_grad_()
    for name in ("reference", "triton"):
        with use_implementation(name):
            _, tvd = fused_ce_tvd(x, x.detach(), torch.zeros(5, dtype=torch.int64))
            assert not tvd.any()
            assert not torch.autograd.grad(tvd.sum(), x)[0].any()


def test_refusals() -> None:
    x, w, tx, tw = heads()
    p, y = torch.rand(5, 12), torch.zeros(5, dtype=torch.int64)
    for error, match, call in (
        (ValueError, r"shift_labels has shape \(4,\)", lambda: fused_linear_jsd(x, w, tx, tw, y[:4])),
        (TypeError, "torch.float32", lambda: fused_linear_jsd(x, w, tx, tw, y.float())),
        (ValueError, r"beta=1\.5", lambda: LigerFusedLinearJSD(jsd_beta=1.5)),
        (ValueError, "temperature must be positive, got 0", lambda: LigerFusedLinearJSD(temperature=0)),
        (ValueError, "jsd_impl='cutile'", lambda: ops.LigerFusedLinearJSDFunction.apply(
            x, w, tx, tw, jsd_impl="cutile")),
        (ValueError, "reduction='none'", lambda: LigerFusedLinearKLDivLoss("none")),
        (ValueError, r"target has shape \(5, 11\)", lambda: fused_linear_kl_div(x, w, p[:, 1:])),
        (ValueError, r"shape \(4, 12\).*5 labels", lambda: fused_linear_kl_div(x, w, p[1:])),
        (ValueError, "not both", lambda: fused_ce_tvd(p, p[1:], y)),
        (ValueError, r"target has shape \(4,\)", lambda: fused_ce_tvd(p, p, y[1:])),
        (IndexError, "target 12 is out of bounds", lambda: fused_ce_tvd(p, p, y + 12)),
    ):  # fmt: skip
        with pytest.raises(error, match=match):
            call()
