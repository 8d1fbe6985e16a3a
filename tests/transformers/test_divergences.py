"""KL divergence, JSD and total variation distance by the incumbent's modules, functions and helpers."""

from __future__ import annotations

import copy
import inspect
import pickle
from typing import Any

import pytest
import torch
from liger_kernel.transformers.jsd import LigerJSD, LigerJSDFunction
from liger_kernel.transformers.kl_div import LigerKLDIVLoss, LigerKLDivLossFunction
from liger_kernel.transformers.tvd import LigerTVDLoss, LigerTVDLossFunction
from torch import Tensor, nn

from liger_kernel import ops
from liger_kernel.ops.jsd import jsd
from liger_kernel.ops.kl_div import kl_div
from liger_kernel.ops.tvd import tvd
from liger_kernel.testing import Make
from liger_kernel.transformers import functional as F

MAKE = Make(torch.float32)
LOG_Q, LOG_P = (MAKE.randn(6, 40).log_softmax(-1) for _ in range(2))
Q, P = LOG_Q.exp(), LOG_P.exp()
LABELS = MAKE.labels(6, 40, 0.4)


def same(a: Tensor, b: Tensor) -> None:
    assert torch.equal(a, b)


def test_modules() -> None:
    same(LigerKLDIVLoss()(LOG_Q, P), kl_div(LOG_Q, P, "mean"))
    module = LigerKLDIVLoss(1e-3, None, None, "sum", True)
    same(module(LOG_Q, LOG_P), kl_div(LOG_Q, LOG_P, "sum", True))
    same(LigerKLDIVLoss(0.02, reduction="none")(LOG_Q, P), kl_div(LOG_Q, P, "none", eps=0.02))
    same(LigerJSD()(LOG_Q, LOG_P), jsd(LOG_Q, LOG_P))
    same(LigerJSD(0.1, 3)(LOG_Q, LOG_P, LABELS), jsd(LOG_Q, LOG_P, LABELS, 0.1, 3))
    same(LigerTVDLoss()(Q, P), tvd(Q, P))
    same(LigerTVDLoss("sum")(Q, P, shift_labels=LABELS), tvd(Q, P, LABELS, "sum"))


def test_modules_are_what_they_say() -> None:
    assert isinstance(LigerKLDIVLoss(), nn.KLDivLoss)
    assert repr(LigerJSD(0.25)) == "LigerJSD(beta=0.25, ignore_index=-100)"
    assert repr(LigerTVDLoss("mean")) == "LigerTVDLoss(reduction='mean', ignore_index=-100)"
    for module in (LigerKLDIVLoss(reduction="batchmean"), LigerJSD(0.3), LigerTVDLoss()):
        for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
            same(other(LOG_Q, LOG_P), module(LOG_Q, LOG_P))
    module = LigerJSD()
    module.beta = 0.9  # options are read at the call
    same(module(LOG_Q, LOG_P), jsd(LOG_Q, LOG_P, beta=0.9))
    with pytest.raises(ValueError, match=r"beta=2\.0"):
        LigerJSD(2.0)
    with pytest.raises(ValueError, match="'avg'"):
        LigerTVDLoss("avg")


def test_gradients_flow_through_the_modules() -> None:
    for module, x, y in (
        (LigerKLDIVLoss(), LOG_Q, P),
        (LigerJSD(), LOG_Q, LOG_P),
        (LigerTVDLoss(), Q, P),
    ):
        leaf = x.clone().requires_grad_()
        module(leaf, y).backward()
        assert leaf.grad is not None
        assert leaf.grad.any()


def test_functional() -> None:
    same(F.liger_kl_div(LOG_Q, P), kl_div(LOG_Q, P, "mean"))
    same(
        F.liger_kl_div(LOG_Q, LOG_P, reduction="batchmean", log_target=True),
        kl_div(LOG_Q, LOG_P, log_target=True),
    )
    same(F.liger_jsd(LOG_Q, LOG_P, LABELS, 0.2, 3), jsd(LOG_Q, LOG_P, LABELS, 0.2, 3))
    same(F.liger_tvd(Q, P), tvd(Q, P, reduction="mean"))
    same(F.liger_tvd(Q, P, LABELS, "none"), tvd(Q, P, LABELS, "none"))


def test_the_old_reductions_of_torch_are_obeyed() -> None:
    same(F.liger_kl_div(LOG_Q, P, reduce=False), kl_div(LOG_Q, P, "none"))
    same(F.liger_kl_div(LOG_Q, P, False), kl_div(LOG_Q, P, "sum"))
    same(F.liger_kl_div(LOG_Q, P, None, None, "sum"), kl_div(LOG_Q, P, "sum"))


@pytest.mark.parametrize(
    ("function", "parameters"),
    [
        (LigerKLDivLossFunction, "y_pred y_true reduction log_target eps"),
        (LigerJSDFunction, "_input target shift_labels beta ignore_index jsd_impl jsd_mode"),
        (LigerTVDLossFunction, "p q shift_labels reduction ignore_index"),
    ],
)
def test_functions(function: Any, parameters: str) -> None:
    assert list(inspect.signature(function.apply).parameters) == parameters.split()
    assert getattr(ops, function.__name__) is function


def test_an_implementation_of_somebody_else_is_refused() -> None:
    with pytest.raises(ValueError, match=r"jsd_impl='cutile'.*LIGER_KERNEL_IMPL"):
        LigerJSDFunction.apply(LOG_Q, LOG_P, None, 0.5, -100, "cutile")


def made(loss: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    return loss.detach(), torch.autograd.grad(loss.sum(), x)[0]


@pytest.mark.parametrize("log_target", [False, True])
def test_helpers_of_kl_div(log_target: bool) -> None:
    y, upstream = LOG_P if log_target else P, MAKE.randn(6, 40)
    terms, _ = made(kl_div(x := LOG_Q.clone().requires_grad_(), y, "none", log_target), x)
    same(ops.kldiv_forward_triton(x, y, log_target, "none", 1e-10), terms)
    for factor in (upstream, torch.tensor(1.0)):
        grads = torch.empty_like(y)
        assert ops.kldiv_backward_triton(y, factor, grads, log_target) is grads
        same(grads, -(y.exp() if log_target else y) * factor)


def test_helpers_of_jsd_and_tvd() -> None:
    x = LOG_Q.clone().requires_grad_()
    for labels, has_label in ((LABELS, True), (LABELS, False)):
        used = labels if has_label else None
        loss, grad = ops.jsd_forward(x, LOG_P, labels, 0.3, -100, has_label)
        assert not loss.requires_grad
        wanted = made(jsd(x, LOG_P, used, 0.3), x)
        assert all(map(torch.equal, (loss, grad), wanted))
        same(ops.jsd_backward(grad, torch.tensor(0.5)), grad * 0.5)
        p = Q.clone().requires_grad_()
        for reduction in ("mean", "none"):
            loss, grad = ops.tv_distance_forward_triton(p, P, labels, reduction, -100, has_label)
            assert all(map(torch.equal, (loss, grad), made(tvd(p, P, used, reduction), p)))
            same(ops.tvd_backward_triton(torch.tensor(0.5), grad), grad * 0.5)
