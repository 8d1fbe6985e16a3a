"""Routers and their losses beside HF's own."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from liger_kernel import backends
from liger_kernel.functional import fused_moe, load_balancing_loss, moe_router, router_z_loss
from liger_kernel.testing import Make, assert_no_worse


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_load_balancing_loss_of_hf(masked: bool, dtype: torch.dtype) -> None:
    hf = pytest.importorskip("transformers.models.mixtral.modeling_mixtral")
    make = Make(dtype)
    layers = [make.randn(14, 6, scale=2.0) for _ in range(3)]
    mask = (torch.arange(14) % 5 > 0).view(2, 7).long() if masked else None

    def run(function: Any, wide: bool = False) -> list[Tensor]:
        given = tuple((t.double() if wide else t.clone()).requires_grad_() for t in layers)
        loss = function(given)
        return [loss.detach(), *torch.autograd.grad(loss, given)]

    ours = run(lambda given: load_balancing_loss(given, 2, mask))
    low = run(lambda given: hf.load_balancing_loss_func(given, 6, 2, mask))
    high = run(lambda given: load_balancing_loss(given, 2, mask), wide=True)
    for name, *found in zip(("loss", "0", "1", "2"), ours, high, low, strict=True):
        assert_no_worse(name, *found)
    # a second implementation of the truth, without gradients
    p = torch.stack([t.double().softmax(-1) for t in layers])
    chosen = torch.zeros_like(p).scatter(-1, p.topk(2).indices, 1.0)
    keep = slice(None) if mask is None else mask.flatten().bool()
    truth = 6 * (chosen[:, keep].mean((0, 1)) * p[:, keep].mean((0, 1))).sum()
    assert_no_worse("truth", ours[0], truth, low[0])


def test_no_token_counts() -> None:
    logits, mask = torch.randn(4, 3, requires_grad=True), torch.zeros(4)
    for loss in (load_balancing_loss(logits, 1, mask), router_z_loss(logits, mask)):
        assert loss == 0
        assert not torch.autograd.grad(loss, logits)[0].any()


def test_z_loss() -> None:
    layers = [Make(torch.float32).randn(5, 4, scale=3.0) for _ in range(2)]
    mask = torch.tensor([1, 1, 0, 1, 1])
    low = torch.stack([t[mask.bool()].logsumexp(-1).square() for t in layers]).mean()
    high = torch.stack([t[mask.bool()].double().logsumexp(-1).square() for t in layers]).mean()
    assert_no_worse("loss", router_z_loss(layers, mask), high, low)


@pytest.mark.usefixtures("on_the_kernels_device")
@pytest.mark.parametrize("implementation", ["reference", "triton"])
def test_the_router_of_deepseek(implementation: str) -> None:
    hf = pytest.importorskip("transformers.models.deepseek_v3.modeling_deepseek_v3")
    router_class = getattr(hf, "DeepseekV3TopkRouter", None)
    if router_class is None:
        pytest.skip("this release of transformers has another router")
    config = SimpleNamespace(
        num_experts_per_tok=3,
        num_local_experts=8,
        n_routed_experts=8,  # its name in transformers 4
        hidden_size=12,
        routed_scaling_factor=2.5,
        n_group=4,
        topk_group=2,
        norm_topk_prob=True,
    )
    router, make = router_class(config), Make(torch.float32)
    router.weight.data = make.randn(8, 12)
    router.e_score_correction_bias.copy_(make.randn(8, scale=0.1))
    x = make.randn(21, 12)
    results = []
    for dtype in (torch.float64, torch.float32):
        given = x.to(dtype).requires_grad_()
        logits = given @ router.weight.detach().to(dtype).t()
        bias = router.e_score_correction_bias
        with backends.use_implementation("reference" if dtype == torch.float64 else implementation):
            weights, index = moe_router(logits, bias, 3, "sigmoid", 4, 2, scale=2.5)
        results.append((weights, index, torch.autograd.grad(weights.square().sum(), given)[0]))
    x.requires_grad_()
    found = [t for t in router(x) if t.shape == (21, 3)]  # transformers 4: index first, no logits
    if not found:
        pytest.skip("this release of transformers chooses experts elsewhere")
    weights, index = sorted(found, key=lambda t: not t.is_floating_point())
    low = weights, index, torch.autograd.grad(weights.square().sum(), x)[0]
    (high, ours), order = results, low[1].argsort(-1)  # HF's are in no order
    assert torch.equal(ours[1], high[1])
    assert torch.equal(ours[1].sort(-1).values, low[1].gather(-1, order))
    by_expert = [w.gather(-1, i.argsort(-1)) for w, i, _ in (ours, high, low)]
    assert_no_worse("weights", *by_expert)
    assert_no_worse("dx", ours[2], high[2], low[2])


def test_router_and_experts_together() -> None:
    make = Make(torch.float32)
    x, w1, w2 = make.randn(2, 5, 8), make.randn(4, 12, 8), make.randn(4, 8, 6)
    weights, index = moe_router(make.randn(2, 5, 4).requires_grad_(), top_k=2)
    fused_moe(x, w1, w2, index, weights).sum().backward()
    assert not index.requires_grad


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"top_k": 5}, "1 to 4 of 8"),
        ({"n_groups": 3}, "must divide the 8"),
        ({"groups_kept": 3}, "in 1 to 2"),
        ({"score": "tanh"}, "'softmax', 'sigmoid'"),
    ],
)
def test_refuses(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        moe_router(torch.randn(3, 8), **{"n_groups": 2, **options})


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (([], 1), "empty"),
        (([torch.ones(3, 4), torch.ones(2, 4)], 1), "every layer"),
        ((torch.ones(3, 4), 5), "there are 4"),
        ((torch.ones(3, 4), 1, torch.ones(2)), "has 2 tokens"),
    ],
)
def test_losses_refuse(given: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_balancing_loss(*given)
