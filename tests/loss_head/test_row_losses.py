"""Every row loss through the one loop: against all logits in float64, in every state a caller can be in."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from liger_kernel.loss_head import products
from liger_kernel.loss_head.fused_linear_cross_entropy import fused_linear_cross_entropy
from liger_kernel.loss_head.losses import ROW_LOSSES, row_loss_class
from liger_kernel.loss_head.losses.cross_entropy import CrossEntropyLoss
from liger_kernel.loss_head.losses.logprobs import LogProbsLoss
from liger_kernel.loss_head.node import linear_loss
from liger_kernel.loss_head.plan import ChunkOptions
from liger_kernel.loss_head.row_loss import MOST_OUTPUTS, FormulaLoss, RowLoss
from liger_kernel.testing import Make, assert_draws_no_worse, assert_no_worse

N, H, T, V = 23, 8, 12, 31
CHUNKS = ChunkOptions(chunk_size=5)


@dataclass(frozen=True)
class Focal(FormulaLoss):
    """(1 - p)^gamma * -log p: a loss of a user, under no name."""

    gamma: float = 2.0

    def formula(self, logits: Tensor, teacher: Tensor | None, target: Tensor) -> tuple[Tensor, ...]:
        at = target.clamp(min=0)[:, None]
        logp = logits.log_softmax(-1).gather(1, at)[:, 0]
        return (-((1 - logp.exp()) ** self.gamma) * logp,)


LOSSES = [
    *(pytest.param(row_loss_class(name), id=name) for name in ROW_LOSSES),
    pytest.param(Focal, id="focal"),
]
loss_classes = pytest.mark.parametrize("cls", LOSSES)
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)


def inputs(dtype: torch.dtype, ignored: float = 0.3, seed: int = 0) -> dict[str, Tensor]:
    make = Make(dtype, seed=seed)
    drawn = {
        "hidden": make.randn(N, H),
        "weight": make.randn(V, H),
        "bias": make.randn(V),
        "target": make.labels(N, V, ignored),
        "t_hidden": make.randn(N, T),
        "t_weight": make.randn(V + 2, T),
        "t_bias": make.randn(V + 2),
    }
    return drawn


def made(cls: Any, reduction: str = "mean", **options: Any) -> Any:
    """With that reduction where it has one, and with every number that it can give."""
    if not issubclass(cls, LogProbsLoss):
        return cls(reduction=reduction, **options)
    numbers = dict.fromkeys(("entropy", "logsumexp", "sum_p2", "mean_logit"), True)
    return cls(**numbers, **options)


def cotangent(output: Tensor) -> Tensor:
    return torch.linspace(0.5, 2, output.numel()).to(output.dtype).view_as(output)


def run(
    loss: RowLoss,
    i: dict[str, Tensor],
    wanted: tuple[str, ...] = ("hidden", "weight", "bias"),
    chunks: ChunkOptions = CHUNKS,
    function: Any = linear_loss,
) -> tuple[list[Any], dict[str, Tensor]]:
    i = {name: t.detach().requires_grad_(name in wanted) for name, t in i.items()}
    teacher = (i["t_hidden"], i["t_weight"], i["t_bias"]) if loss.reads_teacher else None
    found = function(
        loss, i["hidden"], i["weight"], i["target"], i["bias"], teacher=teacher, chunks=chunks
    )
    if not wanted:
        assert not found[0].requires_grad
        return list(found), {}
    (found[0] * cotangent(found[0])).sum().backward()
    return list(found), {name: i[name].grad for name in wanted}


def in_double(i: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: t.double() if t.is_floating_point() else t for name, t in i.items()}


def eager(loss: RowLoss, i: dict[str, Tensor]) -> tuple[list[Any], dict[str, Tensor]]:
    """All logits at once, by autograd through what the loss says of them."""
    i = {n: t.detach().requires_grad_(n in ("hidden", "weight", "bias")) for n, t in i.items()}
    logits = torch.nn.functional.linear(i["hidden"], i["weight"], i["bias"])
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    teacher = torch.nn.functional.linear(i["t_hidden"], i["t_weight"], i["t_bias"]).to(wide.dtype)
    kept = i["target"] != loss.ignore_index
    if isinstance(loss, FormulaLoss):
        columns = loss.formula(wide[kept], teacher[kept], i["target"][kept])
    elif isinstance(loss, LogProbsLoss):
        columns = loss.of_logits(wide[kept], None, i["target"][kept], None)[:1]
    else:
        columns = (
            torch.nn.functional.cross_entropy(wide[kept], i["target"][kept], reduction="none"),
        )
    if loss.reduction == "none":
        found = [c.new_zeros(N, *c.shape[1:]).index_put((kept,), c) for c in columns]
    else:
        found = [
            c.sum() if loss.reduction == "sum" else c.sum() / kept.sum().clamp(min=1)
            for c in columns
        ]
    (found[0] * cotangent(found[0])).sum().backward()
    return found, {name: i[name].grad for name in ("hidden", "weight", "bias")}  # type: ignore[misc]


@dtypes
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@loss_classes
def test_chunks_are_as_exact_as_all_logits(cls: Any, reduction: str, dtype: torch.dtype) -> None:
    loss, i = made(cls, reduction), inputs(dtype)
    ours, our_grads = run(loss, i)
    high, high_grads = eager(loss, in_double(i))
    low, low_grads = eager(loss, i)
    for n, (a, b, c) in enumerate(zip(ours, high, low, strict=False)):
        assert_no_worse(f"output {n}", a.detach(), b.detach(), c.detach())
    for name in our_grads:
        assert_no_worse(name, our_grads[name], high_grads[name], low_grads[name])


@pytest.mark.parametrize("wanted", [(), ("hidden",), ("weight",), ("bias",), ("hidden", "weight")])
@loss_classes
def test_only_what_requires_a_gradient_gets_one(cls: Any, wanted: tuple[str, ...]) -> None:
    i = inputs(torch.float32)
    _, everything = run(made(cls), i)
    _, some = run(made(cls), i, wanted)
    assert some.keys() == set(wanted)
    for name in wanted:
        assert torch.equal(some[name], everything[name])


@loss_classes
def test_the_number_of_rows_of_a_chunk_changes_no_row(cls: Any) -> None:
    i = inputs(torch.float64)
    whole, grads = run(made(cls, "none"), i, chunks=ChunkOptions(chunk_size=N))
    parts, part_grads = run(made(cls, "none"), i, chunks=ChunkOptions(chunk_size=4))
    for a, b in zip(whole, parts, strict=True):
        assert a is b is None or torch.allclose(a, b)
    assert all(torch.allclose(grads[name], part_grads[name]) for name in grads)


@loss_classes
def test_backward_makes_the_logits_of_the_last_chunk_no_second_time(
    cls: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A second backward makes all of them, and gives the same; nothing is kept where there is no backward."""
    rows: list[int] = []
    project = products.HeadProducts.project

    def recorded(head: products.HeadProducts, x: Tensor, out: Tensor) -> None:
        if x.shape[1] == H:  # not those of the teacher
            rows.append(x.shape[0])
        project(head, x, out)

    monkeypatch.setattr(products.HeadProducts, "project", recorded)
    i = inputs(torch.float32, ignored=0.0)
    i = {name: t.detach().requires_grad_(name in ("hidden", "weight")) for name, t in i.items()}
    teacher = (i["t_hidden"], i["t_weight"], None) if cls.reads_teacher else None
    chunks = ChunkOptions(chunk_size=9)
    out = linear_loss(
        made(cls, "none"), i["hidden"], i["weight"], i["target"], teacher=teacher, chunks=chunks
    )[0]
    assert rows == [9, 9, 5]
    rows.clear()
    grads = []
    for expected in ([9, 9], [5, 9, 9]):
        leaves = [i["hidden"], i["weight"]]
        grads += torch.autograd.grad((out * cotangent(out)).sum(), leaves, retain_graph=True)
        assert rows == expected
        rows.clear()
    assert torch.equal(grads[0], grads[2])
    assert torch.equal(grads[1], grads[3])


@loss_classes
def test_no_token_counts(cls: Any) -> None:
    for n_ignored in (0, N):
        i = inputs(torch.float32)
        i["target"][:n_ignored] = -100
        if not n_ignored:
            i = {n: t[:0] if n in ("hidden", "target", "t_hidden") else t for n, t in i.items()}
        found, grads = run(made(cls), i)
        assert not found[0].any()
        assert not any(g.any() for g in grads.values())


@loss_classes
def test_compiles_to_one_graph(cls: Any) -> None:
    """By name through the library op; without a name outside of the graph, which one graph cannot be."""
    i = inputs(torch.float32)
    torch._dynamo.reset()
    named = cls.name in ROW_LOSSES
    compiled = torch.compile(linear_loss, fullgraph=named, backend="aot_eager")
    for reduction in ("mean", "none"):
        loss = made(cls, reduction)
        ours, our_grads = run(loss, i, function=compiled)
        plain, plain_grads = run(loss, i)
        for a, b in zip(ours, plain, strict=True):
            assert a is b is None or torch.equal(a, b)
        assert all(torch.equal(our_grads[name], plain_grads[name]) for name in plain_grads)


def test_options_survive_the_library_op() -> None:
    """Each field of each loss, moved off its default, comes back as it was."""
    from dataclasses import fields

    from liger_kernel.loss_head import library

    other = {bool: lambda v: not v, int: lambda v: v + 7, float: lambda v: v / 2 + 0.125}
    for name in ROW_LOSSES:
        cls = row_loss_class(name)
        for field in fields(cls):
            default = field.default
            change: Any = other.get(type(default), lambda v: "sum" if isinstance(v, str) else 0.75)
            loss = cls(**{field.name: change(default)})
            again = library._decoded(*library._encoded(loss))
            assert again == loss
            assert type(again) is cls
        assert cls.name == name


@loss_classes
def test_what_a_loss_says_of_its_outputs_is_true(cls: Any) -> None:
    for reduction in ("mean", "none"):
        loss = made(cls, reduction)
        found, _ = run(loss, inputs(torch.float32))
        likes = loss.output_likes(inputs(torch.float32)["target"], torch.float32)
        assert len(found) == len(likes) <= MOST_OUTPUTS
        for tensor, (shape, dtype) in zip(found, likes, strict=True):
            if shape is None:
                assert tensor is None
            else:
                assert (tuple(tensor.shape), tensor.dtype) == (tuple(shape), dtype)


@loss_classes
def test_a_teacher_is_given_where_one_is_read(cls: Any) -> None:
    i = inputs(torch.float32)
    teacher = None if cls.reads_teacher else (i["t_hidden"], i["t_weight"], None)
    with pytest.raises(ValueError, match="teacher"):
        linear_loss(cls(), i["hidden"], i["weight"], i["target"], teacher=teacher)


def test_a_formula_has_no_class_weights() -> None:
    i = inputs(torch.float32)
    with pytest.raises(ValueError, match="Focal has no class weights"):
        linear_loss(Focal(), i["hidden"], i["weight"], i["target"], class_weight=torch.ones(V))
    with pytest.raises(ValueError, match="reduction='max'"):
        Focal(reduction="max")


def test_float16_keeps_small_gradients() -> None:
    """Of a mean over many tokens, by a formula as by the kernel."""
    make = Make(torch.float16)
    hidden, weight = make.randn(2048, 4), make.randn(5, 4)
    target = make.labels(2048, 5)
    for loss in (Focal(), CrossEntropyLoss()):
        leaf = weight.clone().requires_grad_()
        linear_loss(loss, hidden, leaf, target)[0].backward()
        exact = weight.double().requires_grad_()
        linear_loss(loss, hidden.double(), exact, target)[0].backward()
        assert leaf.grad is not None
        assert exact.grad is not None
        rounded = exact.grad.half().double()
        assert (leaf.grad.double() - rounded).abs().max() <= 4e-3 * rounded.abs().max()


def cast(function: Any) -> Any:
    """`function` under autocast, whose backward comes after it."""

    def call(*args: Any, **options: Any) -> Any:
        with torch.autocast("cpu", torch.bfloat16):
            return function(*args, **options)

    return call


def by_public_name(
    loss: Any, hidden: Tensor, weight: Tensor, target: Tensor, bias: Tensor, **options: Any
) -> Any:
    """As `linear_loss`, through the helpers that frameworks wrap by name."""
    assert type(loss) is CrossEntropyLoss
    return fused_linear_cross_entropy(
        hidden, weight, target, bias, reduction=loss.reduction, chunk_size=CHUNKS.chunk_size
    )


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize(
    ("cls", "function"),
    [
        *(pytest.param(*p.values, linear_loss, id=p.id) for p in LOSSES),
        pytest.param(CrossEntropyLoss, by_public_name, id="fused_linear_cross_entropy"),
    ],
)
def test_backward_after_autocast(cls: Any, function: Any, reduction: str) -> None:
    """A 16-bit body and a head in fp32, as autocast makes them: each gets its gradient in its own dtype."""
    loss = made(cls, reduction)

    def draw(seed: int) -> Any:
        i = inputs(torch.float32, seed=seed)
        i["hidden"] = i["hidden"].bfloat16()
        ours, grads = run(loss, i, function=cast(function))
        assert {name: grad.dtype for name, grad in grads.items()} == {
            "hidden": torch.bfloat16,
            "weight": torch.float32,
            "bias": torch.float32,
        }
        high, high_grads = eager(loss, in_double(i))
        low, low_grads = cast(eager)(loss, i)
        return [
            {"loss": found[0].detach(), **of_inputs}
            for found, of_inputs in ((ours, grads), (high, high_grads), (low, low_grads))
        ]

    assert_draws_no_worse(draw)
