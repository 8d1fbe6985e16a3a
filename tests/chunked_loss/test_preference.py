"""DPO, CPO, SimPO, ORPO and KTO against the same losses on full logits."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from liger_kernel.chunked_loss import (
    LigerFusedLinearCPOLoss,
    LigerFusedLinearDPOLoss,
    LigerFusedLinearKTOLoss,
    LigerFusedLinearORPOLoss,
    LigerFusedLinearSimPOLoss,
)
from liger_kernel.chunked_loss.dpo_loss import LigerFusedLinearDPOFunction
from liger_kernel.testing import assert_no_worse
from tests.chunked_loss.full_logits import (
    DTYPES,
    IGNORED,
    compare,
    draw_sequences,
    logits_of,
    paired,
    pick,
    sequences,
    wide,
)

dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def logsig(x: torch.Tensor) -> torch.Tensor:
    return -F.softplus(-x)


def sig(x: torch.Tensor) -> torch.Tensor:
    return torch.sigmoid(x)


def dpo(loss_type: str, beta: float, s: float, tau: float) -> Any:
    def pair(c: Any, r: Any, ref_c: Any, ref_r: Any) -> Any:
        a, b = c - ref_c, r - ref_r
        d, won, lost = beta * (a - b), beta * a, beta * b
        if loss_type == "sigmoid":
            loss = -(1 - s) * logsig(d) - s * logsig(-d)
        elif loss_type == "hinge":
            loss = (1 - d).clamp(min=0)
        elif loss_type == "exo_pair":
            log = torch.tensor([1 - s, s], dtype=d.dtype).log()
            loss = sig(d) * (logsig(d) - log[0]) + sig(-d) * (logsig(-d) - log[1])
        elif loss_type == "nca_pair":
            loss = -logsig(won) - 0.5 * logsig(-won) - 0.5 * logsig(-lost)
        elif loss_type == "robust":
            loss = (-(1 - s) * logsig(d) + s * logsig(-d)) / (1 - 2 * s)
        elif loss_type == "bco_pair":
            loss = -logsig(won) - logsig(-lost)
        elif loss_type == "sppo_hard":
            loss = (a - 1 / (2 * beta)) ** 2 + (b + 1 / (2 * beta)) ** 2
        elif loss_type == "apo_zero":
            loss = 1 - sig(won) + sig(lost)
        elif loss_type == "apo_down":
            loss = sig(won) + 1 - sig(d)
        else:
            m = sig(d / tau)
            loss = -logsig(d) * (1 - m) + torch.exp(-d) * m
        return loss, won, lost

    return pair


def run_paired(module: Any, *names: str) -> Any:
    def ours(i: Any) -> Any:
        more = {name: i[key] for name, key in (n.split("=") for n in names) if key in i}
        loss, metrics = module(i["weight"], i["hidden"], i["target"], i.get("bias"), **more)
        return loss, *metrics

    return ours


#: what only some of DPO's loss types read
OWN_OPTIONS: dict[str, dict[str, float]] = {
    **{kind: {"label_smoothing": 0.1} for kind in ("sigmoid", "exo_pair", "robust")},
    "discopop": {"discopop_tau": 0.5},
}
REF = ("ref_input=ref_hidden", "ref_weight=ref_weight", "ref_bias=ref_bias")


@dtypes
@pytest.mark.parametrize("average", [False, True])
@pytest.mark.parametrize("loss_type", sorted(LigerFusedLinearDPOLoss._SUPPORTED_LOSS_TYPES))
def test_dpo(loss_type: str, average: bool, dtype: torch.dtype) -> None:
    nll = average  # each of the two with and without
    module = LigerFusedLinearDPOLoss(
        beta=0.2,
        alpha=0.7 if nll else 1.0,
        compute_nll_loss=nll,
        average_log_prob=average,
        loss_type=loss_type,
        chunk_size=2,
        **OWN_OPTIONS.get(loss_type, {}),
    )
    compare(
        run_paired(module, *REF),
        lambda i: paired(dpo(loss_type, 0.2, 0.1, 0.5), i, average, 0.7, nll),
        draw_sequences(dtype),
    )


@dtypes
@pytest.mark.parametrize("wanted", [("hidden",), ("weight",), ("bias",), ("hidden", "bias"), ()])
def test_dpo_frozen(wanted: tuple[str, ...], dtype: torch.dtype) -> None:
    module = LigerFusedLinearDPOLoss(use_ref_model=False)
    compare(
        run_paired(module),
        lambda i: paired(dpo("sigmoid", 0.1, 0, 1), i, False),
        draw_sequences(dtype, reference=False),
        wanted,
    )


@dtypes
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("average", [False, True])
def test_cpo(average: bool, bias: bool, dtype: torch.dtype) -> None:
    module = LigerFusedLinearCPOLoss(
        beta=0.3, alpha=0.5, label_smoothing=0.1, average_log_prob=average
    )

    def pair(c: Any, r: Any, *_: Any) -> Any:
        d = 0.3 * (c - r)
        return -0.9 * logsig(d) - 0.1 * logsig(-d), 0.3 * c, 0.3 * r

    compare(
        run_paired(module),
        lambda i: paired(pair, i, average, 0.5, True),
        draw_sequences(dtype, reference=False, bias=bias),
    )


@dtypes
def test_simpo(dtype: torch.dtype) -> None:
    module = LigerFusedLinearSimPOLoss(beta=2.0, alpha=0.5, label_smoothing=0.1, gamma=0.4)

    def pair(c: Any, r: Any, *_: Any) -> Any:
        d = 2.0 * (c - r) - 0.4
        return -0.9 * logsig(d) - 0.1 * logsig(-d), 2.0 * c, 2.0 * r

    compare(
        run_paired(module),
        lambda i: paired(pair, i, True, 0.5, True),
        draw_sequences(dtype, reference=False),
    )


@dtypes
@pytest.mark.parametrize("nll", ["none", "target", "nll_target"])
def test_orpo(nll: str, dtype: torch.dtype) -> None:
    module = LigerFusedLinearORPOLoss(beta=0.4, compute_nll_loss=nll != "none")

    def pair(c: Any, r: Any, *_: Any) -> Any:
        odds = (c - r) - (torch.log1p(-c.exp()) - torch.log1p(-r.exp()))
        return -0.4 * logsig(odds), 0.4 * c, 0.4 * r, logsig(odds), odds

    def reference(i: Any) -> Any:
        *found, ratio, odds = paired(pair, i, True, nll=nll != "none")
        return *found, ratio.mean(), odds.mean()

    def draw(seed: int) -> Any:
        i = draw_sequences(dtype, reference=False)(seed)
        if nll == "nll_target":
            i["nll_target"] = i["target"].masked_fill(i["target"] != IGNORED, 3).roll(1, 1)
        return i

    compare(run_paired(module, "nll_target=nll_target"), reference, draw)


@dtypes
@pytest.mark.parametrize("use_ref_model", [False, True])
@pytest.mark.parametrize("average", [False, True])
@pytest.mark.parametrize("kl", [None, 0.25])
def test_kto(kl: float | None, average: bool, use_ref_model: bool, dtype: torch.dtype) -> None:
    beta, labels = 0.2, torch.tensor([True, False, False, True, True])
    module = LigerFusedLinearKTOLoss(
        beta=beta, use_ref_model=use_ref_model, average_log_prob=average, chunk_size=3
    )

    def ours(i: Any) -> Any:
        loss, metrics = module(
            i["hidden"],
            i["weight"],
            i["target"],
            i["bias"],
            preference_labels=labels,
            ref_input=i["ref_hidden"],  # not read without use_ref_model
            ref_weight=i["ref_weight"],
            ref_bias=i["ref_bias"],
            kl=None if kl is None else torch.tensor([kl]),
        )
        return loss, *metrics

    def reference(i: Any) -> Any:
        logits = logits_of(i["hidden"], i["weight"], i["bias"])
        logps = sequences(pick(logits, i["target"]), i["target"], average)
        q = logps
        if use_ref_model:
            ref = pick(logits_of(i["ref_hidden"], i["ref_weight"], i["ref_bias"]), i["target"])
            q = logps - sequences(ref, i["target"], average).detach()
        sums = wide(logits).sum((1, 2))
        loss = sum(
            1 - sig(beta * (q[n] - (kl or 0.0)) * (1 if good else -1))
            for n, good in enumerate(labels.tolist())
        )
        halves = [t[m].sum() for t in (logps, sums, beta * q) for m in (labels, ~labels)]
        return loss / len(labels), *(t.detach() for t in halves)

    compare(ours, reference, draw_sequences(dtype, batch=5))


@pytest.mark.parametrize(
    "module",
    [
        LigerFusedLinearDPOLoss(use_ref_model=False, average_log_prob=True, compute_nll_loss=True),
        LigerFusedLinearCPOLoss(),
        LigerFusedLinearSimPOLoss(),
        LigerFusedLinearORPOLoss(),
        LigerFusedLinearKTOLoss(average_log_prob=True),
    ],
    ids=lambda m: type(m).__name__,
)
@pytest.mark.parametrize("empty", ["all", "one"])
def test_sequences_without_labels(module: Any, empty: str) -> None:
    i = draw_sequences(torch.float32)(0)
    i["target"][:] = IGNORED if empty == "all" else i["target"]
    i["target"][2] = IGNORED  # the rejected side of the first pair
    hidden, weight = i["hidden"].requires_grad_(), i["weight"].requires_grad_()
    if isinstance(module, LigerFusedLinearKTOLoss):
        labels = torch.tensor([True, True, False, False])
        loss, metrics = module(hidden, weight, i["target"], preference_labels=labels)
    else:
        loss, metrics = module(weight, hidden, i["target"])
    with torch.autograd.set_detect_anomaly(True):  # no NaN on the way either
        loss.backward()
    assert hidden.grad is not None
    assert weight.grad is not None
    for t in (loss, *metrics, hidden.grad, weight.grad):
        assert t.isfinite().all()
    assert (hidden.grad[2] == 0).all()
    if empty == "all":
        assert loss == 0
        assert not weight.grad.any()
    else:
        assert loss != 0
        assert hidden.grad[3, 1:].any()


def test_a_pair_with_one_empty_side_compares_nothing() -> None:
    i = draw_sequences(torch.float32)(0)
    i["target"][2] = IGNORED
    hidden = i["hidden"].requires_grad_()
    LigerFusedLinearDPOLoss(use_ref_model=False)(i["weight"], hidden, i["target"])[0].backward()
    assert hidden.grad is not None
    assert not hidden.grad[0].any()
    assert hidden.grad[1].any()


def pairs_of(logps: list[list[float]]) -> dict[str, Any]:
    """Sequences of one token with these log-probabilities, chosen and rejected, by heads of two classes."""
    exact = torch.tensor(logps, dtype=torch.float64).flatten()
    logits = torch.stack([exact, torch.log(-torch.expm1(exact))], -1)
    return {
        "hidden": logits.float()[:, None].requires_grad_(),
        "weight": torch.eye(2).requires_grad_(),
        "target": torch.zeros(len(exact), 1, dtype=torch.long),
    }


@pytest.mark.parametrize(
    "module",
    [
        LigerFusedLinearORPOLoss(beta=1.0),
        *(
            LigerFusedLinearDPOLoss(
                beta=1.0, use_ref_model=False, loss_type=kind, **OWN_OPTIONS.get(kind, {})
            )
            for kind in sorted(LigerFusedLinearDPOLoss._SUPPORTED_LOSS_TYPES)
        ),
    ],
    ids=lambda m: getattr(m, "loss_type", "orpo"),
)
def test_what_float64_can_say_is_said(module: Any) -> None:
    """Of certain tokens, and of such as no model would have sampled; neither is NaN, in loss or gradient."""
    i = pairs_of([[-1e-10, -300.0, -300.0], [-300.0, -1e-10, -300.0]])
    loss, _ = module(i["weight"], i["hidden"], i["target"])
    grads = torch.autograd.grad(loss, (i["hidden"], i["weight"]))
    double = {n: t.detach().double() if n != "target" else t for n, t in i.items()}
    exact, _ = module(double["weight"], double["hidden"], double["target"])
    assert loss.isfinite()
    assert all(grad.isfinite().all() for grad in grads)
    if not isinstance(module, LigerFusedLinearORPOLoss):  # which fp32 cannot tell from certain
        assert_no_worse("loss", loss.detach(), exact, exact.float())


def test_options_that_say_nothing_are_refused() -> None:
    with pytest.raises(
        ValueError, match=r"label_smoothing=0.3 has no effect with loss_type='hinge'"
    ):
        LigerFusedLinearDPOLoss(loss_type="hinge", label_smoothing=0.3)
    with pytest.raises(
        ValueError, match=r"discopop_tau=0.3 .* only with discopop; leave it at 0.05"
    ):
        LigerFusedLinearDPOLoss(discopop_tau=0.3)
    with pytest.raises(ValueError, match="discopop_tau must be positive, got 0"):
        LigerFusedLinearDPOLoss(loss_type="discopop", discopop_tau=0)
    with pytest.raises(ValueError, match=r"alpha=0.5 .* compute_nll_loss=False"):
        LigerFusedLinearCPOLoss(alpha=0.5, compute_nll_loss=False)
    LigerFusedLinearCPOLoss(alpha=0.0, compute_nll_loss=False)  # says the same twice
    for kind in (LigerFusedLinearCPOLoss, LigerFusedLinearSimPOLoss, LigerFusedLinearDPOLoss):
        with pytest.raises(ValueError, match=r"label_smoothing=1.5 is not between"):
            kind(label_smoothing=1.5)


@pytest.mark.parametrize("shape", [(4,), (4, 1), (2,)])
def test_kl_is_one_number(shape: tuple[int, ...]) -> None:
    i = draw_sequences(torch.float32)(0)
    labels = torch.tensor([True, True, False, False])
    call = partial(LigerFusedLinearKTOLoss(), i["hidden"], i["weight"], i["target"])
    with pytest.raises(ValueError, match=r"kl has shape \(.*\); pass one number"):
        call(preference_labels=labels, kl=torch.ones(shape))
    one, other = (
        call(preference_labels=labels, kl=torch.full(shape, 0.3)) for shape in ((), (1, 1))
    )
    assert one[0] == other[0]


def test_arguments() -> None:
    i = draw_sequences(torch.float32, batch=3)(0)
    with pytest.raises(ValueError, match="3 sequences"):
        LigerFusedLinearCPOLoss()(i["weight"], i["hidden"], i["target"])
    with pytest.raises(ValueError, match=r"Unsupported loss_type: ipo\. .*apo_down.*sppo_hard"):
        LigerFusedLinearDPOLoss(loss_type="ipo")
    with pytest.raises(ValueError, match=r"exo_pair.*got 0"):
        LigerFusedLinearDPOLoss(loss_type="exo_pair")
    with pytest.raises(ValueError, match=r"\[0.0, 0.5\).*got 0.5"):
        LigerFusedLinearDPOLoss(loss_type="robust", label_smoothing=0.5)
    with pytest.raises(ValueError, match=r"chunk_size.*got 0"):
        LigerFusedLinearORPOLoss(chunk_size=0)
    with pytest.raises(ValueError, match="ref_input is None"):
        LigerFusedLinearDPOLoss()(i["weight"], i["hidden"][:2], i["target"][:2])
    with pytest.raises(ValueError, match=r"\(B, T, H\)"):
        LigerFusedLinearCPOLoss()(i["weight"], i["hidden"][0], i["target"])
    with pytest.raises(ValueError, match=r"preference_labels must be provided.*\(3,\)"):
        LigerFusedLinearKTOLoss()(i["hidden"], i["weight"], i["target"])


def test_alpha_is_the_last_argument_of_the_dpo_function() -> None:
    i = draw_sequences(torch.float32, reference=False)(0)
    tail = (False, False, 1, "sigmoid", 0.0, 0.05)
    head = (i["hidden"], i["weight"], i["target"], None, None, None, None, IGNORED, 0.1, True, True)
    one, two = (LigerFusedLinearDPOFunction.apply(*head, *tail, alpha) for alpha in (1.0, 2.0))
    torch.testing.assert_close(two[0] - one[0], one[1][4])
