"""The kernel of the row losses of distillation: hard and soft loss in one walk, against all logits in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from liger_kernel.backends import use_implementation
from liger_kernel.backends.records import ChunkSizes
from liger_kernel.loss_head import loop
from liger_kernel.loss_head.fused_linear_jsd import fused_linear_jsd
from liger_kernel.loss_head.losses import ROW_LOSSES, row_loss_class
from liger_kernel.loss_head.losses.distillation import DistillationLoss
from liger_kernel.loss_head.node import linear_loss
from liger_kernel.loss_head.plan import ChunkOptions
from liger_kernel.loss_head.products import GivenRows
from liger_kernel.testing import assert_draws_no_worse, assert_no_worse
from tests.loss_head.test_fused_linear_cross_entropy import Watch
from tests.loss_head.test_row_losses import V, eager, in_double, inputs, run

NAMES = [name for name in ROW_LOSSES if issubclass(row_loss_class(name), DistillationLoss)]
each_loss = pytest.mark.parametrize("name", NAMES)
JSD = row_loss_class("jsd")


def assert_exact(loss: Any, dtype: torch.dtype, classes: int = V + 2, **more: Any) -> None:
    """By the kernel, no worse than eager."""

    def draw(seed: int) -> Any:
        i = {**inputs(dtype, seed=seed), **more}
        for t_name in ("t_weight", "t_bias"):
            i[t_name] = torch.cat([i[t_name], i[t_name]])[:classes]
        with use_implementation("triton"):
            ours, grads = run(loss, i)
        high, high_grads = eager(loss, in_double(i))
        low, low_grads = eager(loss, i)
        return [
            {**{f"output {n}": t.detach() for n, t in enumerate(found)}, **of_inputs}
            for found, of_inputs in ((ours, grads), (high, high_grads), (low, low_grads))
        ]

    assert_draws_no_worse(draw)


@each_loss
@pytest.mark.parametrize(
    ("dtype", "classes", "options"),
    [
        (torch.float32, V, {"reduction": "none", "temperature": 2.0, "hard_weight": 0.75}),
        (torch.float32, V + 2, {}),
        (torch.bfloat16, V - 4, {"temperature": 0.5, "reduction": "sum"}),
        (torch.float16, V, {"hard": False, "hard_weight": 0.0, "soft_weight": 2.0}),
    ],
    ids=["cooled-none", "more-classes", "fewer-classes-sum", "soft-alone"],
)
def test_by_the_kernel(name: str, dtype: torch.dtype, classes: int, options: Any) -> None:
    assert_exact(row_loss_class(name)(**options), dtype, classes)


@pytest.mark.parametrize("beta", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_jsd_of_every_kind(beta: float, temperature: float) -> None:
    assert_exact(JSD(beta=beta, temperature=temperature), torch.float32)


@each_loss
def test_a_row_of_several_blocks(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Walked forwards and backwards; the gradient replaces the logits on the way."""
    from liger_kernel.ops.fused_ce_tvd import triton as kernels

    config = kernels.Config(block=16, warps=4, stages=1)
    monkeypatch.setattr(kernels.Config, "of", staticmethod(lambda *_: config))
    assert_exact(row_loss_class(name)(temperature=2.0), torch.float32)
    assert_exact(row_loss_class(name)(hard=False), torch.float32, V)


def test_far_from_zero() -> None:
    """Logits that all are thousands, and that all are -1000 beside a class that only the teacher has."""
    shift = inputs(torch.float32)["bias"]
    assert_exact(JSD(), torch.float32, V, bias=shift + 2000)
    assert_exact(JSD(hard_weight=1.0), torch.float32, V + 2, bias=shift - 1000)


@each_loss
def test_no_gradient_is_made_of_nothing(name: str) -> None:
    i, loss = inputs(torch.float32), row_loss_class(name)()
    with use_implementation("triton"):
        alone, _ = run(loss, i, wanted=())
        found, _ = run(loss, i)
    for a, b in zip(alone, found, strict=True):
        assert torch.allclose(a, b)


@pytest.mark.parametrize("how", ["eager", "compiled", "by torch.func"])
def test_rows_of_a_teacher_that_are_given(how: str) -> None:
    """Logits, of any strides, of a row that is left out as well."""
    i, loss = inputs(torch.float32), JSD(temperature=2.0)
    hidden, weight, target = i["hidden"], i["weight"].requires_grad_(), i["target"]
    logits = (
        torch.nn.functional.linear(i["t_hidden"], i["t_weight"], i["t_bias"]).t().contiguous().t()
    )
    before = logits.clone()

    def of(function: Any, teacher: Any) -> Any:
        value = lambda w: function(loss, hidden, w, target, teacher=teacher)[0]  # noqa: E731
        if how == "by torch.func":
            return torch.func.grad_and_value(value)(weight)[::-1]
        found = value(weight)
        return found, torch.autograd.grad(found, weight)[0]

    function = linear_loss
    if how == "compiled":
        torch._dynamo.reset()
        function = torch.compile(linear_loss, fullgraph=True, backend="aot_eager")
    given = of(function, (logits, None, None))
    made = of(linear_loss, (i["t_hidden"], i["t_weight"], i["t_bias"]))
    assert all(torch.allclose(a, b) for a, b in zip(given, made, strict=True))
    assert torch.equal(logits, before)
    for wrong in ((logits[:3], None, None), (logits, None, i["t_bias"])):
        with pytest.raises(ValueError, match="A teacher without a weight"):
            linear_loss(loss, hidden, weight, target, teacher=wrong)


@pytest.mark.parametrize("implementation", ["reference", "triton"])
@pytest.mark.parametrize("beta", [0.0, 0.3])
def test_kept_log_probabilities_of_some_classes(beta: float, implementation: str) -> None:
    """As if all others were masked in the teacher's logits."""
    i = inputs(torch.float32)
    weight = i["weight"].requires_grad_()
    logits = torch.nn.functional.linear(i["t_hidden"], i["t_weight"][:V])
    kept = logits.log_softmax(-1).topk(5)
    masked = torch.full_like(logits, -torch.inf).scatter(1, kept.indices, kept.values)
    options = {"jsd_beta": beta, "temperature": 2.0, "chunk_size": 4}
    labels = i["target"]

    def loss(w: Tensor, of: Any = fused_linear_jsd, **more: Any) -> Tensor:
        return of(i["hidden"], w, kept.values, None, labels, teacher_ids=kept.indices, **options)

    with use_implementation(implementation):
        found, expected = (
            (value.detach(), torch.autograd.grad(value, weight)[0])
            for value in (
                loss(weight),
                fused_linear_jsd(i["hidden"], weight, masked, None, labels, **options),
            )
        )
    assert all(map(torch.equal, found, expected))
    assert found[0].isfinite()
    assert found[1].isfinite().all()
    if implementation == "reference":
        torch._dynamo.reset()
        compiled = torch.compile(fused_linear_jsd, fullgraph=True, backend="aot_eager")
        assert torch.equal(loss(weight, compiled), found[0])
        assert torch.allclose(torch.func.grad(loss)(weight), found[1])


def test_wrong_classes_of_a_teacher() -> None:
    i = inputs(torch.float32)
    given, rows = (i["hidden"], i["weight"]), torch.zeros(len(i["target"]), 2)
    ids = torch.arange(2).repeat(len(rows), 1)
    with pytest.raises(RuntimeError, match=f"index {V} is out of bounds .* {V}"):
        fused_linear_jsd(*given, rows, None, teacher_ids=ids + V)
    twice = ids.clone()
    twice[0, 1] = twice[0, 0]
    with pytest.raises(ValueError, match="names a class twice"):
        fused_linear_jsd(*given, rows, None, teacher_ids=twice)
    labels = torch.zeros(len(rows), dtype=torch.long)
    labels[0] = -100  # nobody reads what stands there
    fused_linear_jsd(*given, rows, None, labels, teacher_ids=twice)
    with pytest.raises(ValueError, match=r"integers of this shape, got \(23, 1\)"):
        fused_linear_jsd(*given, rows, None, teacher_ids=ids[:, 1:])
    with pytest.raises(ValueError, match="there is a teacher_weight"):
        fused_linear_jsd(*given, i["t_hidden"], i["t_weight"], teacher_ids=ids)


def test_both_slabs_count_for_the_memory_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    i, chunks, logits = inputs(torch.float32), [], GivenRows.logits
    monkeypatch.setattr(GivenRows, "logits", lambda *of: chunks.append(of) or logits(*of))
    given = i["hidden"], i["weight"]
    rows, ids = torch.zeros(len(i["target"]), 2), torch.tensor([0, 1]).expand(len(i["target"]), 2)
    fused_linear_jsd(*given, rows, None, memory_budget=8 * V, teacher_ids=ids)
    assert len(chunks) == len(rows)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_teacher_has_a_slab_of_fewer_rows(
    reduction: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    i = inputs(torch.float32)
    i["t_weight"], i["t_bias"] = (torch.cat([i[n], i[n]])[: V + 2] for n in ("t_weight", "t_bias"))
    heads = [
        (i[n].clone().requires_grad_(), i[m].clone().requires_grad_())
        for n, m in [("hidden", "weight")] * 2
    ]
    found, teacher = [], (i["t_hidden"], i["t_weight"], i["t_bias"])
    for fewest, head in zip((100, 2), heads, strict=True):
        monkeypatch.setattr(loop, "chunk_sizes", lambda device: ChunkSizes(fewest_rows=fewest))  # noqa: B023
        with Watch() as watch:
            loss = linear_loss(
                JSD(reduction=reduction),
                *head,
                i["target"],
                teacher=teacher,
                chunks=ChunkOptions(chunk_size=5),
            )[0]
            found.append([loss.detach(), *torch.autograd.grad((loss * loss.detach()).sum(), head)])
        assert (5 * (V + 2) in watch.made, 2 * (V + 2) in watch.made) == (
            fewest == 100,
            fewest == 2,
        )
    for one, other in zip(*found, strict=True):
        assert_no_worse("pieces", other, one.double(), one)
