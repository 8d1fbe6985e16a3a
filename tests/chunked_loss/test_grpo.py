"""The GRPO family against the same losses on full logits, one sequence at a time."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss
from liger_kernel.chunked_loss.functional import liger_fused_linear_grpo
from liger_kernel.chunked_loss.fused_linear_ppo import LigerFusedLinearPPOBase
from liger_kernel.chunked_loss.grpo_loss import (
    LigerFusedLinearGRPOFunction,
    get_gamma_weights,
    k3_loss_fn,
    sapo_loss_fn,
)
from liger_kernel.testing import assert_draws_no_worse
from tests.chunked_loss.full_logits import DTYPES, compare, draw_sequences, logits_of, pick

ALL = ("grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "luspo", "vespo")
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def draw_policy(
    dtype: torch.dtype,
    vllm: str | None = None,
    sizes: tuple[int, int, int] = (7, 16, 37),
    advantages: str = "rows",
) -> Any:
    sequences = draw_sequences(dtype, batch=4, sizes=sizes)

    def draw(seed: int) -> Any:
        i: dict[str, Any] = dict(sequences(seed))
        g = torch.Generator().manual_seed(seed + 100)
        batch, length = i["target"].shape
        i["target"] = i["target"].clamp(min=0)
        lengths = torch.tensor([length, 5, 3, 0])  # one completion is empty
        i["mask"] = (torch.arange(length) < lengths[:, None]).long()
        exact = pick(logits_of(i["hidden"].float(), i["weight"].float(), i["bias"]), i["target"])
        i["old"] = exact + 0.3 * torch.randn(batch, length, generator=g)
        shape = {"rows": (batch,), "column": (batch, 1), "tokens": (batch, length)}
        i["advantages"] = torch.randn(shape[advantages], generator=g)
        if vllm:
            i["vllm"] = torch.rand(shape[vllm], generator=g) + 0.5
        return i

    return draw


def clip(x: Any, low: float, high: float) -> Any:
    return x.clamp(low, high)


def token_loss(o: Any, rho: Any, lp: Any, log_ratio: Any, adv: Any, mask: Any, vllm: Any) -> Any:
    """Of one sequence, (T,) or (1,)."""
    kind = o.get("loss_type", "dapo")
    low, high = o.get("epsilon_low", 0.2), o.get("epsilon_high", 0.2)
    if kind == "cispo":
        return -rho.detach().clamp(max=high) * adv * lp
    if kind == "sapo":
        pos, neg = o.get("sapo_temperature_pos", 1.0), o.get("sapo_temperature_neg", 1.05)
        t = torch.where(adv > 0, pos, neg)
        return -adv * 4 / t * (1 / (1 + torch.exp(-t * (rho - 1))))
    if kind == "vespo":
        log_w = (log_ratio.detach() * mask).sum()
        if vllm is not None:
            log_w = log_w + vllm.log().sum()
        k, rate = torch.where(adv >= 0, 2.0, 3.0), torch.where(adv >= 0, 3.0, 2.0)
        phi = torch.exp(log_w.clamp(min=math.log(1e-8)) * k + rate * (1 - log_w.exp()))
        return -phi * adv * lp
    bounded = rho.clamp(max=o["delta"]) if o.get("delta") else rho
    return -torch.min(bounded * adv, clip(rho, 1 - low, 1 + high) * adv)


def full(i: Any, o: dict[str, Any], temperature: float, items: float | None = None) -> Any:
    kind, beta = o.get("loss_type", "dapo"), o.get("beta", 0.04)
    logps = pick(logits_of(i["hidden"], i["weight"], i.get("bias")), i["target"], temperature)
    ref = logps.detach()
    if beta and "ref_hidden" in i:
        ref_logits = logits_of(i["ref_hidden"], i["ref_weight"], i["ref_bias"])
        ref = pick(ref_logits, i["target"], temperature).detach()
    old = i["old"] if "old" in i else logps.detach()
    mask, n_tokens = i["mask"].to(logps.dtype), max(int(i["mask"].sum()), 1)
    total, kl_sum, clip_sum = logps.new_zeros(()), logps.new_zeros(()), logps.new_zeros(())
    batch = len(mask)
    for n in range(batch):
        m, adv = mask[n], i["advantages"][n]
        vllm = i["vllm"][n].reshape(-1) if "vllm" in i else None
        log_ratio = logps[n] - old[n]
        weight = log_ratio
        if o.get("importance_sampling_level") == "sequence":
            weight = ((log_ratio * m).sum() / m.sum().clamp(min=1)).reshape(1)
        rho = weight.exp()
        loss = token_loss(o, rho, logps[n], log_ratio, adv, m, vllm)
        if vllm is not None and kind != "vespo":
            loss = loss * vllm
        if beta:
            x = ref[n] - logps[n]
            kl = x.exp() - x - 1
            kl = kl * rho if o.get("use_bias_correction_kl") else kl
            loss = loss + beta * kl
            kl_sum = kl_sum + (kl * m).sum()
        low, high = 1 - o.get("epsilon_low", 0.2), 1 + o.get("epsilon_high", 0.2)
        if kind == "cispo":
            clipped = (rho > o.get("epsilon_high", 0.2)) & (adv > 0)
        elif kind in ("sapo", "vespo"):
            clipped = torch.zeros_like(rho, dtype=torch.bool)
        else:
            clipped = ((rho < low) & (adv < 0)) | ((rho > high) & (adv > 0))
        clip_sum = clip_sum + (clipped * m).sum()
        if kind in ("grpo", "sapo"):
            total = total + (loss * m).sum() / m.sum().clamp(min=1) / batch
        elif kind == "luspo":
            total = total + (loss * m.sum()).mean() / batch
        elif kind == "dr_grpo":
            total = total + (loss * m).sum() / (batch * o["max_completion_length"])
        else:
            divisor = items if items and kind != "bnpo" else n_tokens
            total = total + (loss * m).sum() / divisor
    metrics = ([kl_sum / n_tokens] if beta else []) + [clip_sum / n_tokens]
    return total, *(t.detach() for t in metrics)


def check(
    dtype: torch.dtype,
    o: dict[str, Any],
    vllm: str | None = None,
    temperature: float = 1.0,
    items: float | None = None,
    without: tuple[str, ...] = (),
    advantages: str = "rows",
    **more: Any,
) -> None:
    drawn = draw_policy(dtype, vllm, advantages=advantages)

    def draw(seed: int) -> Any:
        return {k: t for k, t in drawn(seed).items() if k not in without}

    module = LigerFusedLinearGRPOLoss(**o, temperature=temperature, chunk_size=2)
    module.use_ref_model = "ref_hidden" not in without

    def ours(i: Any) -> Any:
        loss, metrics = module(
            i["hidden"],
            i["weight"],
            i["target"],
            i["mask"],
            i["advantages"],
            i["bias"],
            old_per_token_logps=i.get("old"),
            ref_input=i.get("ref_hidden"),
            ref_weight=i.get("ref_weight"),
            ref_bias=i.get("ref_bias"),
            vllm_is_ratio=i.get("vllm"),
            num_items_in_batch=items,
        )
        return loss, *metrics

    compare(ours, lambda i: full(i, o, temperature, items), draw, **more)


@dtypes
@pytest.mark.parametrize("beta", [0.0, 0.1])
@pytest.mark.parametrize("loss_type", ALL)
def test_loss_types(loss_type: str, beta: float, dtype: torch.dtype) -> None:
    o = {"loss_type": loss_type, "beta": beta, "max_completion_length": 9}
    if loss_type not in ("sapo", "vespo"):
        o["epsilon_high"] = 1.1 if loss_type == "cispo" else 0.3
    check(dtype, o)


@dtypes
@pytest.mark.parametrize("beta", [0.0, 0.1])
@pytest.mark.parametrize("loss_type", ["grpo", "bnpo", "dr_grpo", "dapo", "luspo"])
def test_sequence_level(loss_type: str, beta: float, dtype: torch.dtype) -> None:
    o = {"loss_type": loss_type, "beta": beta, "max_completion_length": 9}
    check(dtype, {**o, "importance_sampling_level": "sequence"})


@pytest.mark.parametrize("vllm", ["rows", "column", "tokens"])
@pytest.mark.parametrize("loss_type", ["grpo", "luspo", "vespo"])
def test_vllm_ratio(loss_type: str, vllm: str) -> None:
    check(torch.float32, {"loss_type": loss_type}, vllm)


@pytest.mark.parametrize("advantages", ["column", "tokens"])
@pytest.mark.parametrize("loss_type", ALL)
def test_advantages_of_sequences_and_tokens(loss_type: str, advantages: str) -> None:
    o = {"loss_type": loss_type, "max_completion_length": 9}
    check(torch.float32, o, advantages=advantages)
    check(torch.float32, o, "tokens", advantages=advantages)


def test_advantages_of_tokens_with_the_ratio_of_a_sequence() -> None:
    check(torch.float32, {"importance_sampling_level": "sequence"}, advantages="tokens")


@dtypes
@pytest.mark.parametrize(
    "case",
    [
        {"o": {"delta": 1.1}},
        {"o": {"use_bias_correction_kl": True}},
        {"o": {"use_bias_correction_kl": True, "importance_sampling_level": "sequence"}},
        {"o": {}, "temperature": 0.7},
        {"o": {}, "items": 50.0},
        {"o": {"loss_type": "cispo", "epsilon_high": 1.1}, "items": 50.0},
        {"o": {"loss_type": "sapo", "sapo_temperature_pos": 0.8, "sapo_temperature_neg": 1.5}},
        {"o": {}, "without": ("old",)},
        {"o": {}, "without": ("ref_hidden", "ref_weight", "ref_bias")},
        {"o": {}, "wanted": ("weight",)},
        {"o": {}, "wanted": ("hidden",)},
        {"o": {}, "wanted": ()},
    ],
    ids=str,
)
def test_options(case: dict[str, Any], dtype: torch.dtype) -> None:
    check(dtype, **case)


@pytest.mark.parametrize("loss_type", ALL)
def test_nothing_sampled_and_garbage_outside_the_mask(loss_type: str) -> None:
    i = draw_policy(torch.float32)(0)
    hidden, weight = i["hidden"].requires_grad_(), i["weight"].requires_grad_()
    mask = torch.zeros_like(i["mask"])
    module = LigerFusedLinearGRPOLoss(loss_type=loss_type, max_completion_length=5)
    for garbage in (-math.inf, math.inf, math.nan):
        old = torch.full_like(i["old"], garbage)
        for rows in (old, old[:, :1], old[:, 0]):
            loss, metrics = module(
                hidden,
                weight,
                i["target"],
                mask,
                rows,
                old_per_token_logps=old,
                ref_per_token_logps=old,
                vllm_is_ratio=rows.abs(),
            )
            hidden.grad = weight.grad = None
            loss.backward()
            assert loss == 0
            assert all(t == 0 for t in metrics)
            assert not hidden.grad.any()
            assert not weight.grad.any()


@pytest.mark.parametrize("loss_type", [kind for kind in ALL if kind != "luspo"])
def test_garbage_outside_the_mask_changes_nothing(loss_type: str) -> None:
    i = draw_policy(torch.float32, advantages="tokens")(0)
    module = LigerFusedLinearGRPOLoss(loss_type=loss_type, max_completion_length=5)
    found = []
    for garbage in (1.0, -math.inf, math.inf, math.nan):
        old, advantages, ratio = (
            t.masked_fill(i["mask"] == 0, garbage)
            for t in (i["old"], i["advantages"], torch.full_like(i["old"], 1.5))
        )
        hidden = i["hidden"].detach().requires_grad_()
        given = (hidden, i["weight"], i["target"], i["mask"], advantages)
        loss, metrics = module(
            *given,
            old_per_token_logps=old,
            ref_per_token_logps=old + 0.1,
            vllm_is_ratio=ratio,
        )
        found.append([loss, *metrics, *torch.autograd.grad(loss, hidden)])
    for others in found[1:]:
        assert all(map(torch.equal, found[0], others))


def far_from_reference(i: Any, gap: float, beta: float, dtype: torch.dtype) -> Any:
    """The default loss and its gradients, where the reference is `gap` surer of one token; powers in float64."""
    leaves = [i[n].detach().to(dtype).requires_grad_() for n in ("hidden", "weight")]
    logps = pick(logits_of(*leaves, None), i["target"]).double()
    x = i["ref"].double() - logps
    loss = -i["advantages"][:, None] + beta * (x.exp() - x - 1)
    ratio = (logps - logps.detach()).exp()
    loss = loss + i["advantages"][:, None] * (1 - ratio)  # the ratio is 1, and has a slope
    loss = (loss * i["mask"]).sum() / i["mask"].sum()
    grads = torch.autograd.grad(loss, leaves)
    wide = torch.promote_types(dtype, torch.float32)
    return [loss.detach().to(wide), *grads]


@pytest.mark.parametrize("gap", [20.0, 60.0, 89.0, 92.0])
def test_a_divergence_that_float32_can_hold(gap: float) -> None:
    """e^89 is beyond it, and yet a mean with a small weight is not."""

    def draw(seed: int) -> Any:
        i = draw_policy(torch.float32)(seed)
        exact = pick(logits_of(i["hidden"].double(), i["weight"].double(), None), i["target"])
        i["ref"] = (exact - 0.1).float()
        i["ref"][0, 3] += gap
        leaves = [i[n].detach().requires_grad_() for n in ("hidden", "weight")]
        given = (*leaves, i["target"], i["mask"], i["advantages"])
        loss, _ = LigerFusedLinearGRPOLoss(beta=1e-3)(*given, ref_per_token_logps=i["ref"])
        runs = [
            [loss.detach(), *torch.autograd.grad(loss, leaves)],
            far_from_reference(i, gap, 1e-3, torch.float64),
            far_from_reference(i, gap, 1e-3, torch.float32),
        ]
        return [{f"output or gradient {n}": t for n, t in enumerate(run)} for run in runs]

    assert_draws_no_worse(draw, first=4)


@pytest.mark.parametrize("gap", [89.0, 120.0, 800.0])
@pytest.mark.parametrize("bias_correction", [False, True])
def test_a_divergence_beyond_float32_is_its_largest_number(
    bias_correction: bool, gap: float
) -> None:
    i = draw_policy(torch.float32)(0)
    leaves = [i[n].detach().requires_grad_() for n in ("hidden", "weight")]
    i["old"][0, 3] += gap
    module = LigerFusedLinearGRPOLoss(use_bias_correction_kl=bias_correction, beta=1e6)
    loss, metrics = module(
        *leaves, i["target"], i["mask"], i["advantages"], ref_per_token_logps=i["old"]
    )
    loss.backward()
    assert loss > 1e38
    assert metrics[0] > 1e36
    for leaf in leaves:
        assert leaf.grad is not None
        assert leaf.grad.isfinite().all()
        assert leaf.grad.any()


@pytest.mark.parametrize("gap", [90.0, 120.0, 900.0])
@pytest.mark.parametrize("sign", [0.0, 1.0])
@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("loss_type", ALL)
def test_a_ratio_that_overflows(loss_type: str, level: str, sign: float, gap: float) -> None:
    """A token that the policy before would hardly have sampled: clipped, or without an advantage, it has no slope."""
    if level == "sequence" and loss_type in ("cispo", "sapo", "vespo"):
        return
    i = draw_policy(torch.float32)(0)
    leaves = [i[n].detach().requires_grad_() for n in ("hidden", "weight")]
    i["old"][0] -= gap
    module = LigerFusedLinearGRPOLoss(
        beta=0.0, loss_type=loss_type, max_completion_length=5, importance_sampling_level=level
    )
    given = (*leaves, i["target"], i["mask"], i["advantages"].abs() * sign)
    loss, _ = module(*given, old_per_token_logps=i["old"])
    loss.backward()
    assert loss.isfinite()
    for leaf in leaves:
        assert leaf.grad is not None
        assert leaf.grad.isfinite().all()
    if loss_type != "cispo" or not sign:  # whose gradient is that of the log-probability
        assert not leaves[0].grad[0].any()


@pytest.mark.parametrize("shape", [(0, 7), (4, 0)])
@pytest.mark.parametrize("loss_type", ALL)
def test_no_sequences_and_no_tokens(loss_type: str, shape: tuple[int, int]) -> None:
    i = draw_policy(torch.float32)(0)
    rows, length = shape
    leaves = [i["hidden"][:rows, :length].requires_grad_(), i["weight"].requires_grad_()]
    target, mask, old = (i[name][:rows, :length] for name in ("target", "mask", "old"))
    module = LigerFusedLinearGRPOLoss(loss_type=loss_type, max_completion_length=5)
    given = (*leaves, target, mask, i["advantages"][:rows])
    loss, metrics = module(*given, old_per_token_logps=old, ref_per_token_logps=old)
    assert loss == 0
    assert all(t == 0 for t in metrics)
    assert not any(grad.any() for grad in torch.autograd.grad(loss, leaves))


def test_given_reference_logps_win_with_a_warning() -> None:
    i = draw_policy(torch.float32)(0)
    module = LigerFusedLinearGRPOLoss()
    args = (i["hidden"], i["weight"], i["target"], i["mask"], i["advantages"])
    expected = module(*args, ref_per_token_logps=i["old"])
    with pytest.warns(UserWarning, match="ref_per_token_logps is used"):
        found = module(
            *args,
            ref_per_token_logps=i["old"],
            ref_input=i["ref_hidden"],
            ref_weight=i["ref_weight"],
        )
    assert found[0] == expected[0]


def test_arguments() -> None:
    i = draw_policy(torch.float32)(0)
    args = (i["hidden"], i["weight"], i["target"], i["mask"], i["advantages"])
    with pytest.raises(ValueError, match=r"Unknown loss type: ppo.*dr_grpo.*vespo"):
        LigerFusedLinearGRPOLoss(loss_type="ppo")
    with pytest.raises(ValueError, match="Unknown importance sampling level: word"):
        LigerFusedLinearGRPOLoss(importance_sampling_level="word")
    for kind in ("cispo", "sapo", "vespo"):
        with pytest.raises(ValueError, match=f"not supported for loss_type='{kind}'"):
            LigerFusedLinearGRPOLoss(loss_type=kind, importance_sampling_level="sequence")
    for name in ("sapo_temperature_pos", "sapo_temperature_neg", "delta"):
        with pytest.raises(ValueError, match=f"{name} must be positive, got -1"):
            LigerFusedLinearGRPOLoss(**{name: -1.0})
    with pytest.raises(ValueError, match="max_completion_length must be provided"):
        LigerFusedLinearGRPOLoss(loss_type="dr_grpo", beta=0.0)(*args)
    with pytest.raises(ValueError, match="neither ref_per_token_logps nor ref_input"):
        LigerFusedLinearGRPOLoss()(*args)
    with pytest.raises(ValueError, match=r"vllm_is_ratio has shape \(3,\)"):
        LigerFusedLinearGRPOLoss(beta=0.0)(*args, vllm_is_ratio=torch.ones(3))
    with pytest.raises(ValueError, match="attention_mask has shape"):
        LigerFusedLinearGRPOLoss(beta=0.0)(*args[:3], i["mask"][:, 1:], i["advantages"])


def test_function_and_module_agree() -> None:
    i = draw_policy(torch.float32)(1)
    module = LigerFusedLinearGRPOLoss(beta=0.1, loss_type="bnpo", delta=1.2, temperature=0.9)
    args = (i["hidden"], i["weight"], i["target"], i["mask"], i["advantages"], i["bias"])
    args = (*args, i["old"], i["old"] + 0.1, None, None, None)
    options = (0.1, 0.2, 0.2, "bnpo", None, "token", 1.0, 1.05, 0.9, True, True, 1, None, 1.2)
    loss, metrics = liger_fused_linear_grpo(*args, *options)
    expected, expected_metrics = module(*args)
    assert loss == expected
    assert metrics == expected_metrics
    module.beta = 0.0  # trainers may set options later
    assert len(module(*args)[1]) == 1


def test_helpers() -> None:
    p, q = torch.tensor([-1.0]), torch.tensor([-2.0])
    assert k3_loss_fn(p, q).item() == pytest.approx(math.e - 2)
    assert sapo_loss_fn(torch.ones(1), 2.0).item() == pytest.approx(1.0)
    with pytest.raises(ValueError, match="sapo_temperature must be > 0"):
        sapo_loss_fn(p, 0.0)
    gamma = get_gamma_weights(torch.tensor([1.0, -1.0]), torch.zeros(2, 3), torch.ones(2, 3))
    assert gamma.tolist() == [[1.0], [1.0]]  # an unchanged policy weighs 1
    count = LigerFusedLinearPPOBase._compute_dapo_normalizer
    assert count(torch.ones(2, 3)) == 6
    assert count(torch.zeros(2, 3)) == 1
    assert count(torch.ones(2, 3), torch.tensor(9)) == 9
    assert LigerFusedLinearGRPOFunction.chunk_forward is LigerFusedLinearPPOBase.chunk_forward
