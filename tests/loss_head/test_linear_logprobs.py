"""Log-probabilities from hidden states beyond the cases: each gradient by itself, bounds, memory, ways to call."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from liger_kernel import backends
from liger_kernel.functional import LogProbs, linear_logprobs, linear_logprobs_loss, logprobs
from liger_kernel.loss_head.linear_logprobs.cases import SPEC
from liger_kernel.loss_head.losses.logprobs import LogProbsLoss
from liger_kernel.ops import LigerFusedLinearScaledCrossEntropyFunction as ScaledCrossEntropy
from liger_kernel.ops.logprobs import portable, step
from liger_kernel.ops.logprobs import triton as kernels
from liger_kernel.ops.logprobs.contract import NUMBERS, LogProbRows, LogProbsOptions
from liger_kernel.testing import Make, assert_draws_no_worse, assert_no_worse
from tests.loss_head.test_fused_linear_cross_entropy import Watch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
EVERY: dict[str, Any] = dict.fromkeys(NUMBERS[1:], True)


@pytest.fixture(params=["reference", "triton"])
def implementation(request: pytest.FixtureRequest) -> Any:
    with backends.use_implementation(request.param):
        yield request.param


def drawn(
    rows: int = 7, hidden: int = 8, classes: int = 50, dtype: torch.dtype = torch.float32, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    make = Make(dtype, DEVICE, seed)
    states, weight = make.randn(rows, hidden), make.randn(classes, hidden, scale=0.5)
    return states.requires_grad_(), weight.requires_grad_(), make.labels(rows, classes, 0.3)


def gradients(found: LogProbs, names: tuple[str, ...], inputs: tuple[Tensor, ...]) -> list[Tensor]:
    """Of a weighted sum of these numbers."""
    outputs = [getattr(found, name) for name in names]
    weights = torch.linspace(0.5, 2, outputs[0].numel()).to(outputs[0]).view_as(outputs[0])
    return list(torch.autograd.grad(sum((o * weights).sum() for o in outputs), inputs[:2]))


@pytest.mark.parametrize("names", [*((name,) for name in NUMBERS), NUMBERS[:2]], ids="+".join)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_gradient_of_each_number_by_itself(
    names: tuple[str, ...], dtype: torch.dtype, implementation: str
) -> None:
    options = {"temperature": 0.7, "softcap": 3.0, **EVERY}

    def draw(seed: int) -> Any:
        runs = []
        states, weight, ids = drawn(dtype=dtype, seed=seed)
        for function, to, how in (
            (SPEC.function, dtype, {"chunk_size": 3}),
            (SPEC.reference, torch.float64, {}),
            (SPEC.reference, dtype, {}),
        ):
            given = (states.detach().to(to), weight.detach().to(to), ids)
            for t in given[:2]:
                t.requires_grad_()
            found = function(*given, None, None, **options, **how)
            runs.append(dict(zip(("dX", "dW"), gradients(found, names, given), strict=True)))
        return runs

    assert_draws_no_worse(draw)


def test_no_gradient_is_made_that_nobody_asks_for() -> None:
    states, weight, _ = drawn(12)
    ids = torch.tensor([3] * 5 + [-100] * 7)
    with Watch() as watch, backends.use_implementation("reference"):
        linear_logprobs(states, weight, ids, entropy=True, chunk_size=3)
        assert watch.products == 2
        frozen = linear_logprobs(states, weight.detach(), ids, entropy=True, chunk_size=3)
        watch.products = 0
        frozen.entropy.sum().backward()  # type: ignore[union-attr]
    assert watch.products == 3  # logits of the first chunk, and dX of two
    assert max(watch.made) == max(3 * 50, states.numel())
    assert weight.grad is None
    with torch.no_grad():
        assert not linear_logprobs(states, weight, ids).log_prob.requires_grad


@pytest.mark.parametrize("classes", [1, 2, 37, 1000])
def test_bounds_hold_whatever_the_rounding(classes: int, implementation: str) -> None:
    """Of uniform and of certain distributions, and of those between them."""
    make = Make(torch.float32, DEVICE)
    heights = torch.tensor([0.0, 1e-4, 1e-3, 0.1, 1.0, 30.0, 3e4], device=DEVICE)
    logits = make.randn(7, classes) * heights[:, None]
    logits[0] = 1.1
    ids = logits.argmax(-1)
    for ours in (
        logprobs(logits, ids, entropy=True, sum_p2=True),
        torch.compile(logprobs, backend="eager")(logits, ids, entropy=True, sum_p2=True),
    ):
        assert ours.entropy is not None
        assert ours.sum_p2 is not None
        assert (ours.log_prob <= 0).all()
        assert (ours.entropy.double() >= 0).all()
        assert (ours.entropy.double() <= math.log(classes)).all()
        assert torch.isfinite(ours.sum_p2).all()


def test_a_temperature_for_each_token(implementation: str) -> None:
    """Also where ignored tokens are left out; a number gives what the same number for all gives."""

    def draw(seed: int) -> Any:
        states, weight, ids = drawn(dtype=torch.float32, seed=seed)
        each = torch.linspace(0.5, 1.5, len(ids), device=DEVICE)
        options = {"softcap": 3.0, "chunk_size": 2, **EVERY}
        mixed = linear_logprobs(states, weight, ids, temperature=each, **options)
        one_by_one = [
            linear_logprobs(states[i], weight, ids[i], temperature=float(each[i]), **options)
            for i in range(len(ids))
        ]
        high, low = (
            SPEC.reference(*(t.to(to) for t in (states, weight)), ids, None, each.to(to), **EVERY, softcap=3.0)
            for to in (torch.float64, torch.float32)
        )  # fmt: skip
        ours, true, eager = (
            {name: getattr(found, name).detach() for name in NUMBERS}
            | dict(zip(("dX", "dW"), gradients(found, NUMBERS, (states, weight)), strict=True))
            for found in (mixed, high, low)
        )
        for name in NUMBERS:
            apart = torch.stack([getattr(found, name) for found in one_by_one])
            ours[f"{name} apart"] = apart.detach()
            true[f"{name} apart"], eager[f"{name} apart"] = true[name], eager[name]
        return ours, {name: t.double() for name, t in true.items()}, eager

    assert_draws_no_worse(draw)


def test_a_loss_of_all_numbers_makes_the_logits_once() -> None:
    """A policy loss with an entropy bonus and temperatures: gradients as from the numbers one by one."""
    rows: list[int] = []
    each = torch.linspace(0.5, 1.5, 12, device=DEVICE).view(3, 4)

    def loss_of(found: LogProbs) -> tuple[Tensor, tuple[Tensor, ...]]:
        assert found.entropy is not None
        ratio = (found.log_prob - found.log_prob.detach()).exp()
        return -(ratio + 0.3 * found.entropy).square().sum(), (found.entropy.mean(),)

    def run(function: Any, dtype: torch.dtype) -> dict[str, Tensor]:
        states, weight, ids = drawn(12, dtype=dtype)
        inputs = states.view(3, 4, 8), weight, ids.view(3, 4)
        with Watch() as watch:
            loss, reported = function(*inputs, entropy=True, temperature=each)
            rows.append(watch.products)
            grads = torch.autograd.grad(loss, (states, weight))
        assert not reported[0].requires_grad
        return dict(
            zip(("loss", "reported", "dX", "dW"), (loss.detach(), *reported, *grads), strict=True)
        )

    def once(*inputs: Tensor, **options: Any) -> Any:
        return linear_logprobs_loss(loss_of, *inputs, **options)

    def twice(*inputs: Tensor, **options: Any) -> Any:
        loss, reported = loss_of(linear_logprobs(*inputs, **options))
        return loss, [t.detach() for t in reported]

    with backends.use_implementation("reference"):
        ours, high, low = (
            run(once, torch.float32),
            run(twice, torch.float64),
            run(twice, torch.float32),
        )
    assert rows[0] == 3 * rows[1]  # the products of both gradients, too, before backward
    for name, found in ours.items():
        assert_no_worse(name, found, high[name], low[name])


def test_any_leading_shape_and_dtype_of_ids() -> None:
    states, weight, ids = drawn(6)
    flat = linear_logprobs(states, weight, ids, top1=True, top_k=3, **EVERY)
    shaped = linear_logprobs(
        states.view(2, 3, 8).transpose(0, 1), weight, ids.view(2, 3).t().int(), top1=True, top_k=3, **EVERY
    )  # fmt: skip
    for a, b in zip(flat, shaped, strict=True):
        assert a is not None
        assert b is not None
        assert b.shape[:2] == (3, 2)
        assert torch.equal(a.view(2, 3, *a.shape[1:]).transpose(0, 1), b)
    only = linear_logprobs(states, weight, ids)
    assert only[1:] == (None,) * 7
    scalar = linear_logprobs(states[0], weight, ids[0])
    assert scalar.log_prob.shape == ()


def test_what_comes_out_may_be_written_to() -> None:
    states, weight, ids = drawn()
    for options in ({}, {"entropy": True}):
        found = linear_logprobs(states, weight, ids, **options)
        expected = torch.autograd.grad(2 * found.log_prob.sum(), states, retain_graph=True)[0]
        written = found.log_prob
        written *= 2
        assert torch.equal(torch.autograd.grad(written.sum(), states)[0], expected)


def test_the_largest(implementation: str) -> None:
    logits = torch.tensor([[1.0, 3, 2, -torch.inf], [4, 4, 0, 1], [2, 1, 0, 3]], device=DEVICE)
    ids = torch.tensor([1, 1, -100], device=DEVICE)
    found = logprobs(logits, ids, top1=True, top_k=2, temperature=2.0)
    assert found.is_top1 is not None
    assert found.top_ids is not None
    assert found.top_log_probs is not None
    assert found.is_top1.tolist() == [True, False, False]  # the first of equal ones
    assert found.top_ids.tolist()[::2] == [[1, 2], [-1, -1]]
    high = (logits.double() / 2).log_softmax(-1).topk(2, -1).values
    low = (logits / 2).log_softmax(-1).topk(2, -1).values
    assert_no_worse("largest", found.top_log_probs[:2], high[:2], low[:2])
    assert not found.top_log_probs[2].any()
    turned = logprobs(logits[1:2], ids[1:2], scale=-1.0, top_k=1).top_ids
    assert turned is not None
    assert turned.item() == 2


@pytest.mark.parametrize("run", [portable.step, kernels.step], ids=["plain", "triton"])
def test_id_out_of_range_gives_nan(run: Callable[..., None]) -> None:
    """On a GPU nobody checks the ids: such a row must not read outside of its logits, nor pass for a good one."""
    options = LogProbsOptions(entropy=True)
    for wrong in (40, 2**40, -1):
        logits = Make(torch.float32, DEVICE).randn(3, 40)
        ids = torch.tensor([1, wrong, -100], device=DEVICE)
        out, grad = LogProbRows.empty(ids, torch.float32, options), torch.empty_like(logits)
        kernel = type("Kernels", (), {"step": staticmethod(run)})
        step(kernel, logits, ids, None, options=options, out=out, grad=grad)
        assert out.loss[:, 0].isnan().tolist() == [False, True, False]
        assert grad.isnan().any(1).tolist() == [False, True, False]
        assert not grad[2].any()


def test_logits_far_from_zero(implementation: str) -> None:
    """Where the logarithm of the sum is lost beside the largest logit."""
    logits = Make(torch.float32, DEVICE).randn(4, 90) + 2.0**22
    ids = torch.arange(4, device=DEVICE)
    found = logprobs(logits, ids, entropy=True)
    assert found.entropy is not None
    high, low = ((logits.to(d) - 2.0**22).log_softmax(-1) for d in (torch.float64, torch.float32))
    chosen = (log_p.gather(1, ids[:, None])[:, 0] for log_p in (high, low))
    assert_no_worse("log-probabilities", found.log_prob, *chosen)
    assert_no_worse("entropy", found.entropy, *(-(p.exp() * p).sum(-1) for p in (high, low)))


@pytest.mark.parametrize(
    "options", [{"entropy": True}, {"top1": True, "top_k": 3, **EVERY}], ids=len
)
def test_compiles_to_one_graph(options: dict[str, Any]) -> None:
    torch._dynamo.reset()
    states, weight, ids = drawn()
    each = torch.linspace(0.5, 1.5, len(ids), device=DEVICE)

    def call(*inputs: Tensor) -> LogProbs:
        return linear_logprobs(*inputs, temperature=each, chunk_size=3, **options)

    names = LogProbsOptions(**options).numbers
    ours, plain = (
        function(states, weight, ids)
        for function in (torch.compile(call, fullgraph=True, backend="aot_eager"), call)
    )
    for a, b in zip(ours, plain, strict=True):
        assert a is b is None or torch.equal(a, b)
    for a, b in zip(*(gradients(f, names, (states, weight)) for f in (ours, plain)), strict=True):
        assert torch.equal(a, b)


def test_one_graph_for_any_number_of_tokens() -> None:
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda x, w, ids: linear_logprobs(x, w, ids, entropy=True, top_k=2),
        fullgraph=True,
        backend="aot_eager",
        dynamic=True,
    )
    for rows in (6, 4):
        states, weight, ids = drawn(rows)
        ours, plain = (
            compiled(states, weight, ids),
            linear_logprobs(states, weight, ids, entropy=True),
        )
        assert torch.equal(ours.entropy, plain.entropy)
        grads = (gradients(found, NUMBERS[:2], (states, weight)) for found in (ours, plain))
        assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_transforms_of_torch_func() -> None:
    states, weight, ids = (t.detach() for t in drawn())

    def total(x: Tensor) -> Tensor:
        found = linear_logprobs(x, weight.to(x.dtype), ids, **EVERY)
        return sum(getattr(found, name).sum() for name in NUMBERS)  # type: ignore[return-value]

    leaf = states.clone().requires_grad_()
    (plain,) = torch.autograd.grad(total(leaf), leaf)
    found, high = (torch.func.grad(total)(x) for x in (states, states.double()))
    assert_no_worse("gradient", plain, high, found)
    # for each row: one number would be judged by its luck
    rows = torch.eye(len(states), device=DEVICE)[:, :, None].expand(-1, -1, states.shape[1])
    along = torch.vmap(lambda tangent: torch.func.jvp(total, (states,), (tangent,))[1])(rows)
    assert_no_worse("jvp", along, high.sum(1), found.sum(1))
    hessian = torch.func.hessian(
        lambda x: linear_logprobs(x, weight, ids[:1], entropy=True).entropy.sum()
    )  # type: ignore[union-attr]
    assert hessian(states[:1]).isfinite().all()


def test_autocast() -> None:
    states, weight, ids = drawn()
    with torch.autocast(DEVICE, torch.bfloat16):
        found = linear_logprobs(states, weight, ids, entropy=True)
    assert found.log_prob.dtype == torch.float32
    dx, dw = gradients(found, NUMBERS[:2], (states, weight))
    assert dx.dtype == dw.dtype == torch.float32
    plain = linear_logprobs(states.bfloat16(), weight.bfloat16(), ids, entropy=True)
    assert torch.equal(found.log_prob, plain.log_prob)


def nothing(found: Any) -> tuple[Tensor, tuple[()]]:
    return found.log_prob.sum() * 0, ()


@pytest.mark.parametrize("wrong", [0.0, -1.0, math.inf, math.nan])
def test_a_temperature_that_is_none(wrong: float) -> None:
    """An error where the host can look, NaN in a graph and on a GPU; that of an ignored token does not matter."""
    states, weight, ids = drawn()
    ids = torch.arange(len(ids), device=DEVICE)
    temperature = torch.ones(ids.shape, device=DEVICE)
    temperature[2:4] = wrong
    ids[2] = -100

    def found() -> Tensor:
        return linear_logprobs(states, weight, ids, temperature=temperature).log_prob

    if DEVICE == "cpu":
        with pytest.raises(ValueError, match=f"temperature is {wrong} for a token"):
            found()
    else:
        assert found().isnan().tolist() == [i == 3 for i in range(len(ids))]
    compiled = torch.compile(found, fullgraph=True, backend="eager")()
    assert compiled.isnan().tolist() == [i == 3 for i in range(len(ids))]
    ids[3] = -100
    assert found().isfinite().all()


def test_bad_input_is_refused() -> None:
    states, weight, ids = drawn()
    for options, said in (
        ({"temperature": 0.0}, "temperature=0.0 is not a finite number above 0.0"),
        ({"temperature": math.inf}, "temperature=inf"),
        ({"temperature": torch.ones(3)}, r"\(3,\) and ids \(7,\)"),
        ({"temperature": torch.ones(7).requires_grad_()}, "temperature requires a gradient"),
        ({"softcap": -1.0}, "softcap=-1.0 is not above 0.0"),
        ({"scale": math.nan}, "scale=nan"),
        ({"top_k": 51}, "top_k=51 is not between 0 and the 50 classes"),
        ({"bias": torch.ones(3)}, "bias has shape"),
        ({"label_count": 8}, "label_count=8 for 7 labels"),
    ):
        with pytest.raises(ValueError, match=said):
            linear_logprobs(states, weight, ids, **options)
    with pytest.raises(ValueError, match=r"hidden has shape \(7, 8\) and ids \(3,\)"):
        linear_logprobs(states, weight, ids[:3])
    with pytest.raises(
        ValueError, match="top1=True and top_k=0 are nothing that a loss depends on"
    ):
        linear_logprobs_loss(
            lambda found: (found.log_prob.sum(), ()), states, weight, ids, top1=True
        )
    beta = torch.ones((), device=DEVICE, requires_grad=True)
    with pytest.raises(ValueError, match="requires a gradient, which it would not get"):
        linear_logprobs_loss(lambda found: ((beta * found.log_prob).sum(), ()), states, weight, ids)
    for of_loss, options, error, said in (
        (lambda f: f.log_prob.sum(), {}, TypeError, r"loss_of returned tensor\("),
        (lambda f: (f.log_prob, ()), {}, TypeError, "not a loss of shape"),
        (nothing, {"group_size": 4}, ValueError, "group_size=4 does not part 7 tokens"),
        (nothing, {"group_size": 0}, ValueError, "group_size=0 does not part 7 tokens"),
        (nothing, {"order": ids[:3]}, ValueError, r"order has shape \(3,\); pass each of the 7"),
    ):
        with pytest.raises(error, match=said):
            linear_logprobs_loss(of_loss, states, weight, ids, **options)
    with pytest.raises(IndexError, match="50 is out of bounds for 50 classes"):
        linear_logprobs(states, weight, torch.full_like(ids, 50))
    with pytest.raises(TypeError, match="temperature must have a floating dtype"):
        linear_logprobs(states, weight, ids, temperature=ids)
    with pytest.raises(TypeError, match=r"float32, but weight is torch\.float64"):
        linear_logprobs(states, weight.double(), ids)
    assert LogProbsLoss().recomputes


# --- verl -----------------------------------------------------------------------------------------


def test_as_verl_calls_it() -> None:
    """`FusedLinearForPPO` of verl 0.9.1, and what its own path computes."""
    states, weight, ids = drawn(dtype=torch.bfloat16)
    for temperature in (1.0, 0.7):
        nll, entropy = ScaledCrossEntropy.apply(states, weight, ids, temperature, -100, 1, True)
        assert (nll.dtype, entropy.dtype) == (torch.float32, torch.bfloat16)
        found = [nll.detach(), entropy.detach()]
        found += torch.autograd.grad((nll + entropy).sum(), (states, weight))

        def theirs(dtype: torch.dtype, temperature: float = temperature) -> list[Tensor]:
            x, w = (t.detach().to(dtype).requires_grad_() for t in (states, weight))
            logits = (x @ w.t()).to(torch.promote_types(dtype, torch.float32)) / temperature
            log_p = logits.log_softmax(-1)
            kept = ids != -100
            nll = -log_p.gather(1, ids.clamp(min=0)[:, None])[:, 0] * kept
            entropy = (-(log_p.exp() * log_p).sum(-1) * kept).to(dtype)
            grads = torch.autograd.grad((nll + entropy).sum(), (x, w))
            return [nll.detach(), entropy.detach(), *grads]

        names = ("nll", "entropy", "dX", "dW")
        for name, a, b, c in zip(names, found, theirs(torch.float64), theirs(torch.bfloat16), strict=True):  # fmt: skip
            assert_no_worse(name, a, b, c)
    alone = ScaledCrossEntropy.apply(states, weight, ids, temperature=0.7)
    assert torch.equal(alone, nll)


def test_selected_classes_and_refusals() -> None:
    states, weight, ids = drawn()
    chosen = torch.tensor([4, 4, 0], device=DEVICE)
    _, selected = ScaledCrossEntropy.apply(states, weight, ids, 0.7, selected_token_ids=chosen)
    truth = (states.double() @ weight.double().t() / 0.7).log_softmax(-1)[:, chosen]
    eager = (states @ weight.t() / 0.7).log_softmax(-1)[:, chosen]
    ignored = (ids == -100)[:, None]
    assert_no_worse("selected", selected, *(t.masked_fill(ignored, 0) for t in (truth, eager)))
    assert selected.requires_grad
    for options, error, said in (
        ({"m_tiles_per_cluster": True}, TypeError, "m_tiles_per_cluster must be an int"),
        ({"m_tiles_per_cluster": 0}, ValueError, "m_tiles_per_cluster must be >= 1"),
        ({"return_entropy": 1}, TypeError, "return_entropy must be a bool"),
        ({"temperature": True}, TypeError, "temperature must be a real number"),
        ({"temperature": -1}, ValueError, "above 0.0"),
    ):
        with pytest.raises(error, match=said):
            ScaledCrossEntropy.apply(states, weight, ids, **options)
