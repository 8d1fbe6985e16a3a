"""KL divergence, JSD and total variation distance beyond the cases: torch's numbers, what is refused, DTensors."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from liger_kernel import backends
from liger_kernel.backends import kernels_of
from liger_kernel.ops.divergences import kernels
from liger_kernel.ops.jsd import jsd
from liger_kernel.ops.kl_div import kl_div
from liger_kernel.ops.tvd import tvd
from liger_kernel.testing import Make, assert_no_worse

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LOSSES = {"kl_div": kl_div, "jsd": jsd, "tvd": tvd}
Loss = Callable[..., Tensor]
each_loss = pytest.mark.parametrize("name", LOSSES)


@pytest.fixture(params=["reference", "triton"], autouse=True)
def implementation(request: pytest.FixtureRequest) -> Iterator[str]:
    with backends.use_implementation(request.param):
        yield request.param


def log_pair(rows: int = 6, classes: int = 70, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    make = Make(dtype, DEVICE)
    return [make.randn(rows, classes, scale=2).log_softmax(-1) for _ in range(2)]


def pair_of(name: str, *shape: int) -> tuple[Tensor, Tensor]:
    x, y = log_pair(*shape)
    x, y = x.exp() if name == "tvd" else x, y if name == "jsd" else y.exp()
    return x.requires_grad_(), y


def run(loss: Loss, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Loss and gradient; those in float64 by the reference, since kernels have none."""
    leaf = x.detach().clone().requires_grad_()
    exact = x.dtype == torch.float64
    with backends.use_implementation("reference") if exact else contextlib.nullcontext():
        found = loss(leaf, y)
    weights = torch.linspace(1, 2, found.numel(), device=DEVICE).view_as(found)
    return found.detach(), torch.autograd.grad((found * weights).sum(), leaf)[0]


def assert_like(ours: Loss, plain: Loss, x: Tensor, y: Tensor) -> None:
    """In fp32, against `plain` in float64 and fp32."""
    low, high = run(plain, x, y), run(plain, x.double(), y.double())
    for what, *found in zip(("loss", "gradient"), run(ours, x, y), high, low, strict=True):
        assert_no_worse(what, *found)


class TestAgainstTorch:
    @pytest.mark.parametrize("log_target", [False, True])
    @pytest.mark.parametrize("reduction", ["batchmean", "mean", "sum", "none"])
    def test_kl_div(self, reduction: str, log_target: bool) -> None:
        x, y = log_pair()
        y = y if log_target else y.exp()
        options: dict[str, Any] = {"reduction": reduction, "log_target": log_target}
        assert_like(
            lambda x, y: kl_div(x, y, **options), lambda x, y: F.kl_div(x, y, **options), x, y
        )

    def test_kl_div_without_eps_knows_small_probabilities(self) -> None:
        x, y = log_pair()
        y = (20 * y).log_softmax(-1).exp()
        assert (y < 1e-10).any()
        assert_like(
            lambda x, y: kl_div(x, y, "none", eps=0.0),
            lambda x, y: F.kl_div(x, y, reduction="none"),
            x,
            y,
        )

    @pytest.mark.parametrize("beta", [0.0, 0.1, 0.5, 0.9, 1.0])
    def test_jsd_is_a_mixture_of_kl(self, beta: float) -> None:
        def plain(x: Tensor, y: Tensor) -> Tensor:
            def kl(log_p: Tensor, log_q: Tensor) -> Tensor:
                return F.kl_div(log_q, log_p, reduction="batchmean", log_target=True)

            if beta in (0.0, 1.0):
                return kl(y, x) if beta == 0 else kl(x, y)
            m = (beta * y.exp() + (1 - beta) * x.exp()).log()
            return beta * kl(y, m) + (1 - beta) * kl(x, m)

        assert_like(lambda x, y: jsd(x, y, beta=beta), plain, *log_pair())

    @pytest.mark.parametrize(
        ("reduction", "divisor"), [("batchmean", 6), ("mean", 420), ("sum", 1)]
    )
    def test_tvd(self, reduction: str, divisor: int) -> None:
        x, y = (t.exp() for t in log_pair())
        y[0] = x[0]  # where the derivative is 0
        assert_like(
            lambda x, y: tvd(x, y, reduction=reduction),
            lambda x, y: F.l1_loss(x, y, reduction="sum") / (2 * divisor),
            x,
            y,
        )


@pytest.mark.parametrize("name", ["jsd", "tvd"])
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.int16, torch.uint8])
def test_ignored_rows_are_as_if_they_were_not_there(name: str, dtype: torch.dtype) -> None:
    """Whatever they hold. As a byte, 251 is -5 and is not ignored; the labels have gaps."""
    x, y = pair_of(name, 9)
    labels = torch.tensor([1, -5, 2, -5, 3, 4, -5, 0, -5], device=DEVICE).to(dtype)
    kept = labels != -5 if dtype != torch.uint8 else torch.ones_like(labels, dtype=torch.bool)
    labels = labels.repeat_interleave(2)[::2]
    spoilt = [t.detach().masked_fill(~kept[:, None], torch.nan) for t in (x, y)]
    loss, grad = run(lambda x, y: LOSSES[name](x, y, labels, ignore_index=-5), *spoilt)
    expected, some = run(LOSSES[name], x[kept], y[kept])
    assert_no_worse("loss", loss, expected.double(), expected)
    assert_no_worse("gradient", grad[kept], some.double(), some)
    assert not grad[~kept].any()


@pytest.mark.parametrize("beta", [0.0, 0.1, 0.3, 1.0])
def test_nothing_but_ignored_rows_is_0(beta: float) -> None:
    labels = torch.full((6,), -100, device=DEVICE)
    loss, grad = run(lambda x, y: jsd(x, y, labels, beta), *log_pair())
    assert loss == 0
    assert not grad.any()


def test_reduction_none_of_ignored_rows() -> None:
    x, y = pair_of("tvd")
    labels = torch.tensor([-100, 1, 2, -100, 3, 4], device=DEVICE)
    terms, grad = run(lambda x, y: tvd(x, y, labels, "none"), x, y)
    assert terms.shape == x.shape
    for t in (terms, grad):
        assert t.any(1).tolist() == [False, True, True, False, True, True]


@each_loss
def test_nan_stays_nan(name: str) -> None:
    for at in range(2):
        x, y = (t.detach().clone() for t in pair_of(name))
        (x, y)[at][2, 3] = torch.nan
        loss, grad = run(LOSSES[name], x, y)
        assert loss.isnan()
        if (name, at) != ("kl_div", 0):  # whose gradient knows nothing of x
            assert (name, grad[2, 3].isnan().item()) in ((name, True), ("tvd", False))


def test_nothing_is_lost_where_distributions_are_far_apart() -> None:
    """As in `exp(log q)` of a mixture, whose logarithm would be -inf."""
    x = torch.tensor([[0.0, -150.0, -200.0]], device=DEVICE, requires_grad=True)
    y = torch.tensor([[-150.0, 0.0, -220.0]], device=DEVICE)
    loss, grad = run(jsd, x, y)
    high = run(jsd, x.double(), y.double())[0]
    assert_no_worse("loss", loss, high, high.float())
    assert grad.isfinite().all()


@pytest.mark.parametrize("name", ["kl_div", "jsd"])
def test_float16_keeps_the_gradients_of_unlikely_classes(name: str) -> None:
    """Divided by the rows they would be 0: a gradient scaler comes too late for what is made in forward."""
    x, y = log_pair(300, 2000, torch.float16)
    y = y.exp() if name == "kl_div" else y

    def scaled(x: Tensor, y: Tensor) -> Tensor:
        return LOSSES[name](x, y).to(torch.promote_types(x.dtype, torch.float32)) * 2.0**14

    ours, high, low = (
        run(scaled, x.to(dtype), y)[1] for dtype in (x.dtype, torch.float64, torch.float32)
    )
    kept = high.half() != 0
    shares = [t[kept].double() / high[kept] for t in (ours, low.half())]
    assert_no_worse(
        "share of the gradient", shares[0].half(), torch.ones_like(shares[0]), shares[1].half()
    )


@each_loss
def test_backward_scales_each_time(name: str) -> None:
    x, y = pair_of(name)
    unit, scaled = (LOSSES[name](x, y) for _ in range(2))
    (once,) = torch.autograd.grad(unit, x)
    (half,) = torch.autograd.grad(scaled * 0.5, x, retain_graph=True)
    assert torch.equal(half, once * 0.5)
    (again,) = torch.autograd.grad(scaled, x)
    assert torch.equal(again, once)
    assert torch.equal(half, once * 0.5)
    with pytest.raises(RuntimeError, match="retain_graph=True"):
        torch.autograd.grad(scaled, x)


@pytest.mark.parametrize("name", ["kl_div", "tvd"])
def test_none_can_go_backward_twice(name: str) -> None:
    x, y = pair_of(name)
    terms = LOSSES[name](x, y, reduction="none")
    first, second = (torch.autograd.grad(terms.sum(), x, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)


@each_loss
def test_the_fixed_distribution_gets_no_gradient(name: str) -> None:
    x, y = pair_of(name)
    assert not LOSSES[name](x.detach(), y.requires_grad_()).requires_grad
    LOSSES[name](x, y).backward()
    assert x.grad is not None
    assert y.grad is None


@each_loss
def test_no_gradient_is_made_under_no_grad(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    plain = kernels._run
    monkeypatch.setattr(
        kernels, "_run", lambda *a, **k: (asked.append(k.get("grad")), plain(*a, **k))
    )
    x, y = pair_of(name)
    with torch.no_grad(), backends.use_implementation("triton"):
        assert not LOSSES[name](x, y).requires_grad
    assert asked == [None]


@each_loss
def test_a_row_is_spread_over_programs_without_a_trace(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, y = pair_of(name, 5, 700)
    found = []
    for config in (
        kernels.Config(2, 1024, 1, 4),
        kernels.Config(1, 128, 1, 4),
        kernels.Config(4, 64, 3, 4),
    ):
        monkeypatch.setattr(kernels.Config, "of", lambda n, config=config: config)
        with backends.use_implementation("triton"):
            found.append(run(LOSSES[name], x, y))
    for loss, grad in found[1:]:
        assert_no_worse("loss", loss, found[0][0].double(), found[0][0])
        assert torch.equal(grad, found[0][1])


@each_loss
def test_compiles_to_one_graph(name: str, implementation: str) -> None:
    x, y = pair_of(name)
    options = (
        {}
        if name == "kl_div"
        else {"shift_labels": torch.tensor([1, -100, 2, 3, 4, 5], device=DEVICE)}
    )
    torch._dynamo.reset()
    compiled = torch.compile(LOSSES[name], fullgraph=True, backend="aot_eager")
    with backends.use_implementation(None if implementation == "triton" else implementation):
        loss = compiled(x, y, **options)
        (grad,) = torch.autograd.grad(loss, x)
    expected = LOSSES[name](x, y, **options)
    assert_no_worse("loss", loss, expected.double(), expected)
    (wanted,) = torch.autograd.grad(expected, x)
    assert_no_worse("gradient", grad, wanted.double(), wanted)


@each_loss
def test_arguments_are_checked(name: str) -> None:
    x, y = pair_of(name)
    labels = torch.zeros(6, dtype=torch.int64, device=DEVICE)
    wrong: list[tuple[Any, str, dict[str, Any]]] = [
        (ValueError, r"\(6, 70\).*\(6, 69\).*\.view\(-1, V\)", {"y": y[:, :69]}),
        (ValueError, r"\(2, 3, 70\)", {"x": x.view(2, 3, 70), "y": y.view(2, 3, 70)}),
        (TypeError, "int64", {"y": y.long()}),
    ]
    if name == "jsd":
        wrong += [(ValueError, rf"beta={beta}", {"beta": beta}) for beta in (-0.1, 1.5)]
    else:
        wrong += [(ValueError, "'avg'.*'batchmean', 'mean', 'sum', 'none'", {"reduction": "avg"})]
    if name != "kl_div":
        wrong += [
            (ValueError, r"shift_labels.*\(5,\).*6 rows", {"shift_labels": labels[:5]}),
            (TypeError, r"shift_labels.*float32", {"shift_labels": labels.float()}),
        ]
    for error, words, change in wrong:
        given = {"x": x, "y": y, **change}
        with pytest.raises(error, match=words):
            LOSSES[name](given.pop("x"), given.pop("y"), **given)


def test_dtypes_of_both_may_differ() -> None:
    x, y = pair_of("kl_div")
    loss, grad = run(kl_div, x.bfloat16(), y)
    assert (loss.dtype, grad.dtype) == (torch.float32, torch.bfloat16)
    assert jsd(x.bfloat16(), y.log()).dtype == torch.bfloat16
    assert kl_div(x.bfloat16(), y.double()).dtype == torch.float32


def test_a_device_without_kernels_falls_back() -> None:
    from tests import dummy_backend  # registers itself

    x, y = pair_of("jsd")
    with backends.use_implementation(dummy_backend.DUMMY.name if DEVICE == "cpu" else "reference"):
        assert not hasattr(kernels_of("jsd", x), "launch")
        assert torch.autograd.grad(jsd(x, y), x)[0].isfinite().all()
