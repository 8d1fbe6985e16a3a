"""GRPO and its relatives of given logits, in the call forms of the incumbent: against the loss of hidden states."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from liger_kernel.transformers.grpo_loss import _reduce_grpo_loss, triton_grpo_loss
from torch import Tensor

from liger_kernel.backends import use_implementation
from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss
from liger_kernel.ops import GrpoLossFunction
from liger_kernel.ops.grpo_loss import fused_selective_log_softmax
from liger_kernel.testing import Make, assert_no_worse

B, L, V = 3, 4, 12


@pytest.fixture(params=["reference", "triton"], autouse=True)
def implementation(request: pytest.FixtureRequest) -> Iterator[str]:
    with use_implementation(request.param):
        yield request.param


def inputs(seed: int = 0) -> dict[str, Any]:
    make = Make(torch.float32, seed=seed)
    logits = make.randn(B, L + 1, V, scale=2)
    ids = make.integers(V, B, L)
    own = logits[:, :-1].log_softmax(-1).gather(2, ids[..., None])[..., 0]
    mask = make.integers(4, B, L) > 0
    mask[0], mask[1, 0] = False, True  # a sequence without a token
    return {
        "logits": logits,
        "old": own + make.randn(B, L, scale=0.4),
        "ref": own + make.randn(B, L, scale=0.4),
        "ids": ids.masked_fill(~mask, 10**6),  # whatever stands there
        "advantages": make.randn(B),
        "mask": mask,
        "ratio": make.randn(B, L).abs() + 0.5,
    }


def linear(dtype: torch.dtype, i: dict[str, Any], **options: Any) -> tuple[Any, Tensor]:
    """By the loss of hidden states, whose head is the identity."""
    t = {k: v.to(dtype) if v.is_floating_point() else v for k, v in i.items()}
    hidden = t["logits"][:, :-1].clone().requires_grad_()
    with use_implementation("reference"):
        loss, metrics = LigerFusedLinearGRPOLoss(temperature=0.9, **options)(
            *(hidden, torch.eye(V, dtype=dtype), t["ids"].clamp(max=V - 1), t["mask"]),
            *(t["advantages"], None, t["ref"], t["old"]),
            vllm_is_ratio=t["ratio"],
        )
        return (loss, *metrics), torch.autograd.grad(loss, hidden)[0]


CALLS: list[dict[str, Any]] = [
    {"loss_type": "grpo", "beta": 0.1, "delta": 1.4},
    {"loss_type": "bnpo", "beta": 0.0},
    {"loss_type": "dr_grpo", "beta": 0.1, "max_completion_length": 9},
    {"loss_type": "dapo", "beta": 0.2, "use_bias_correction_kl": True},
    {"loss_type": "cispo", "beta": 0.1, "epsilon_high": 1.2},
    {"loss_type": "sapo", "beta": 0.0, "sapo_temperature_neg": 1.5},
    {"loss_type": "vespo", "beta": 0.1, "vespo_k_pos": 1.5},
    {"loss_type": "grpo", "importance_sampling_level": "sequence", "beta": 0.1},
    {"loss_type": "dapo", "importance_sampling_level": "sequence", "beta": 0.2, "use_bias_correction_kl": True},
]  # fmt: skip


def call(i: dict[str, Any], reduce: bool = True, inplace: bool = False, **options: Any) -> Any:
    names = {"epsilon_low": "eps_low", "epsilon_high": "eps_high"}
    options = {"eps_high": 0.2, **{names.get(k, k): v for k, v in options.items()}}
    given = (i["logits"], i["old"], i["ref"], i["ids"], i["advantages"], i["mask"])
    return triton_grpo_loss(
        *given, reduce=reduce, inplace=inplace, vllm_is_ratio=i["ratio"], **options
    )


@pytest.mark.parametrize("options", CALLS, ids=lambda o: "-".join(map(str, o.values())))
def test_as_the_loss_of_hidden_states(options: dict[str, Any]) -> None:
    i = inputs()
    i["logits"].requires_grad_()
    loss, metrics = call(i, **options)
    grad = torch.autograd.grad(loss, i["logits"])[0]
    assert not grad[:, -1].any()
    (high, high_grad), (low, low_grad) = (
        linear(dtype, i, **options) for dtype in (torch.float64, torch.float32)
    )
    for n, (a, b, c) in enumerate(zip((loss, *metrics), high, low, strict=True)):
        assert_no_worse(f"output {n}", a.detach(), b.detach(), c.detach())
    assert_no_worse("gradient", grad[:, :-1], high_grad, low_grad)
    # token by token, and the reduction afterwards
    each, _, _ = call(i, reduce=False, **options)
    assert each.shape == (B, L)
    assert not each[~i["mask"]].any()
    summed = _reduce_grpo_loss(each, i["mask"], options["loss_type"], options.get("max_completion_length"))  # fmt: skip
    assert torch.allclose(summed, loss)
    again = torch.autograd.grad(summed, i["logits"])[0]
    assert_no_worse("gradient of tokens", again[:, :-1], high_grad, low_grad)


def test_luspo_weighs_a_sequence_by_its_length() -> None:
    i = inputs()
    i["logits"].requires_grad_()
    each, kl, clipped = call(i, reduce=False, loss_type="luspo", beta=0.0)
    lengths = i["mask"].sum(1, keepdim=True)
    loss, metrics = call(i, loss_type="luspo", beta=0.0)
    assert kl is None
    assert torch.allclose(loss, (each * lengths).mean())
    assert torch.allclose(metrics[0], clipped.sum() / i["mask"].sum())


def test_the_gradient_takes_the_place_of_the_logits_where_that_was_asked_for(
    implementation: str,
) -> None:
    i = inputs()
    leaf = i["logits"].requires_grad_()
    for reduce in (True, False):
        expected = torch.autograd.grad(call(i, reduce=reduce)[0].sum(), leaf)[0]
        i["logits"] = made = leaf * 1
        before = made.detach().clone()
        loss = call(i, reduce=reduce, inplace=True)[0].sum()
        assert torch.equal(made, before)
        grad = torch.autograd.grad(loss, made, retain_graph=False)[0]
        assert torch.allclose(grad, expected)
        in_place = grad.data_ptr() == made.data_ptr()
        assert in_place == (implementation == "triton")
        if not in_place:
            return
        i["logits"] = made = leaf * 1
        loss = call(i, reduce=reduce, inplace=True)[0].sum()
        with pytest.raises(RuntimeError, match=r"retain_graph=True would read again"):
            torch.autograd.grad(loss, made, retain_graph=True)
        # who else needs the logits learns that they are gone
        other = made.exp().sum()
        square = (made**2).sum()
        torch.autograd.grad(loss, made)
        torch.autograd.grad(other, made)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            torch.autograd.grad(square, made)
        i["logits"] = leaf


def test_a_packed_batch_is_one_sequence_with_advantages_of_tokens() -> None:
    i = inputs()
    i["logits"].requires_grad_()
    advantages = i["advantages"][:, None].expand(B, L)
    each = call(i, reduce=False, beta=0.1)[0]
    pick = lambda t: t.reshape(1, B * L)  # noqa: E731
    packed = {k: pick(i[k]) for k in ("old", "ref", "ids", "mask", "ratio")}
    packed["advantages"] = pick(advantages)
    rows = i["logits"][:, :-1].reshape(1, B * L, V)
    packed["logits"] = torch.cat([rows, rows[:, :1]], 1)
    found = call(packed, reduce=False, beta=0.1)[0]
    assert torch.equal(found.view(B, L), each)
    grads = (torch.autograd.grad(t.sum(), i["logits"])[0] for t in (found, each))
    assert torch.equal(*grads)


def test_log_probabilities() -> None:
    """Of the last tokens of longer inputs, of any strides."""
    i = inputs()
    ids = torch.cat([i["ids"] + 10**6, i["ids"].clamp(max=V - 1)], 1).t().contiguous().t()
    mask = torch.cat([i["mask"], i["mask"]], 1)
    logits = i["logits"].transpose(0, 1).contiguous().transpose(0, 1).requires_grad_()
    found = fused_selective_log_softmax(logits, ids, 0.7, mask)
    assert not found.requires_grad
    low, high = (
        (t[:, :-1] / 0.7)
        .log_softmax(-1)
        .gather(2, ids[:, -L:, None])[..., 0]
        .masked_fill(~i["mask"], 0)
        for t in (logits.detach(), logits.detach().double())
    )
    assert_no_worse("logps", found, high, low)
    everything = fused_selective_log_softmax(logits, ids)
    assert everything.all()
    ids[:, -L:].masked_fill_(~i["mask"], -1)
    assert torch.equal(fused_selective_log_softmax(logits, ids, 0.7, mask), found)
    with pytest.raises(IndexError, match=f"token -1 is out of bounds for {V} classes"):
        fused_selective_log_softmax(logits, ids)  # of these no token is left out


def test_options_of_a_call() -> None:
    i = inputs()
    given = [
        i["logits"],
        i["old"],
        i["ref"],
        i["ids"],
        i["advantages"],
        i["mask"],
        0.9,
        0.1,
        0.2,
        0.2,
        False,
    ]
    function = GrpoLossFunction.apply
    whole = function(*given, "dapo", num_items_in_batch=2 * i["mask"].sum())[0]
    assert torch.allclose(2 * whole, function(*given, "dapo")[0])
    floats = [*given]
    floats[5] = i["mask"].float()
    assert torch.equal(function(*floats)[0], function(*given)[0])
    for match, change, options in (
        ("Unknown loss_type 'ppo'", {}, {"loss_type": "ppo"}),
        ("'group' is not one of", {}, {"importance_sampling_level": "group"}),
        ("not supported for loss_type='sapo'", {}, {"loss_type": "sapo", "importance_sampling_level": "sequence"}),
        ("delta .* not supported for loss_type='cispo'", {}, {"loss_type": "cispo", "delta": 1.5}),
        ("requires phi_seq", {}, {"loss_type": "vespo"}),
        ("requires ref_logp", {2: None}, {}),
        ("temperature must be positive", {6: 0.0}, {}),
        ("sapo_temperature_pos must be positive", {}, {"loss_type": "sapo", "sapo_temperature_pos": 0.0}),
        (r"old_logp has shape \(3, 3\)", {1: i["old"][:, 1:]}, {}),
        (r"advantages has shape \(2,\)", {4: i["advantages"][1:]}, {}),
        (r"mask have shape \(3, 3\)", {5: i["mask"][:, 1:]}, {}),
        (r"one sequence, B = 1", {0: i["logits"][0]}, {}),
        (r"weight of the loss has shape \(3, 3\)", {}, {"vllm_is_ratio": i["ratio"][:, 1:]}),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=match):
            function(*(change.get(n, t) for n, t in enumerate(given)), **options)
