"""Two thin matrices whose product is added to the logits of each chunk, as by LoRA on the head."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from liger_kernel import backends
from liger_kernel.loss_head.fused_linear_cross_entropy import fused_linear_cross_entropy
from liger_kernel.loss_head.losses.jsd import JSDLoss
from liger_kernel.loss_head.node import linear_loss
from liger_kernel.testing import Make, assert_draws_no_worse
from tests.loss_head.test_products import padded as padded

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NAMES = ("hidden", "weight", "bias", "rows", "columns")


@pytest.fixture(autouse=True)
def plain_implementation() -> Any:
    with backends.use_implementation("reference" if DEVICE == "cpu" else None):
        yield


def drawn(
    dtype: torch.dtype, seed: int, thin: torch.dtype | None, bias: bool, classes: int
) -> tuple[list[Tensor | None], Tensor]:
    make, wide = Make(dtype, DEVICE, seed), Make(thin or dtype, DEVICE, seed + 1)
    tensors: list[Tensor | None] = [make.randn(9, 16), make.randn(classes, 16, scale=0.3)]
    tensors.append(make.randn(classes) if bias else None)
    tensors += [wide.randn(9, 3), wide.randn(classes, 3, scale=0.5)]
    return tensors, make.labels(9, classes, 0.3)


def stock(tensors: list[Any], target: Tensor, reduction: str) -> Tensor:
    hidden, weight, bias, rows, columns = tensors
    logits = F.linear(hidden, weight, bias)
    logits = (logits + F.linear(rows, columns)).to(hidden.dtype)
    wide = torch.promote_types(logits.dtype, torch.float32)
    return F.cross_entropy(logits.to(wide), target, reduction=reduction)


def found(
    run: Any, tensors: list[Tensor | None], needs: set[str], dtype: torch.dtype | None = None
) -> dict[str, Tensor]:
    leaves = [
        t if t is None else t.to(dtype or t.dtype).detach().requires_grad_(name in needs)
        for name, t in zip(NAMES, tensors, strict=True)
    ]
    loss = run(leaves)
    wanted = {n: t for n, t in zip(NAMES, leaves, strict=True) if t is not None and n in needs}
    weights = torch.linspace(0.5, 1.5, loss.numel(), device=loss.device).view_as(loss)
    grads = torch.autograd.grad((loss * weights.to(loss)).sum(), list(wanted.values()))
    return {"loss": loss.detach(), **dict(zip(wanted, grads, strict=True))}


@pytest.mark.parametrize(
    ("dtype", "thin", "reduction", "needs", "bias", "options"),
    [
        (torch.float32, None, "mean", set(NAMES), True, {"chunk_size": 4}),
        (torch.float32, None, "none", {"hidden", "rows", "columns"}, False, {"chunk_size": 4}),
        (torch.bfloat16, torch.float32, "mean", {"hidden", "rows", "columns"}, False, {}),
        (torch.bfloat16, None, "sum", {"columns"}, False, {"chunk_size": 4}),
        (torch.float32, None, "mean", {"rows"}, False, {}),
        (torch.float32, None, "mean", {"hidden", "weight"}, False, {"chunk_size": 5}),
    ],
)
def test_as_all_logits(
    dtype: torch.dtype,
    thin: torch.dtype | None,
    reduction: str,
    needs: set[str],
    bias: bool,
    options: dict[str, Any],
) -> None:
    needs = needs if bias else needs - {"bias"}

    def draw(seed: int) -> Any:
        tensors, target = drawn(dtype, seed, thin, bias, 50)

        def ours(leaves: list[Any]) -> Tensor:
            hidden, weight, bias, *low = leaves
            return fused_linear_cross_entropy(
                hidden,
                weight,
                target,
                bias,
                low_rank=tuple(low),
                reduction=reduction,
                label_count=int((target >= 0).sum()),
                **options,
            )[0]

        def theirs(leaves: list[Any]) -> Tensor:
            return stock(leaves, target, reduction)

        high = found(theirs, tensors, needs, torch.float64)
        return found(ours, tensors, needs), high, found(theirs, tensors, needs)

    assert_draws_no_worse(draw, first=8 if dtype == torch.bfloat16 else 1)


def test_a_head_in_two_parts(padded: None) -> None:
    """Whose rows are padded; zeros stay zeros."""

    def draw(seed: int) -> Any:
        tensors, target = drawn(torch.float32, seed, None, False, 77)

        def ours(leaves: list[Any]) -> Tensor:
            hidden, weight, _, *low = leaves
            return fused_linear_cross_entropy(hidden, weight, target, low_rank=tuple(low))[0]

        def theirs(leaves: list[Any]) -> Tensor:
            return stock(leaves, target, "mean")

        needs = set(NAMES) - {"bias"}
        high = found(theirs, tensors, needs, torch.float64)
        return found(ours, tensors, needs), high, found(theirs, tensors, needs)

    assert_draws_no_worse(draw)


def test_one_graph() -> None:
    tensors, target = drawn(torch.float32, 0, None, False, 50)

    def loss(leaves: list[Any]) -> Tensor:
        low = tuple(leaves[3:])
        return fused_linear_cross_entropy(*leaves[:2], target, low_rank=low, chunk_size=4)[0]

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    needs = {"hidden", "rows", "columns"}
    ours, eager = (found(run, tensors, needs) for run in (compiled, loss))
    assert all(torch.equal(ours[name], eager[name]) for name in eager)


def test_other_row_losses_take_it_too() -> None:
    tensors, target = drawn(torch.float64, 0, None, False, 50)
    hidden, weight, _, rows, columns = tensors
    assert hidden is not None
    assert weight is not None
    assert rows is not None
    assert columns is not None
    loss, teacher = JSDLoss(reduction="sum"), (hidden.flip(0), weight, None)
    together = torch.cat((hidden, rows), 1), torch.cat((weight, columns), 1)
    expected = linear_loss(loss, *together, target, teacher=teacher)[0]
    low_rank = (rows, columns)
    found = linear_loss(loss, hidden, weight, target, teacher=teacher, low_rank=low_rank)[0]
    assert (found - expected).abs() <= 4 * torch.finfo(torch.float64).eps * expected.abs()


def test_no_rows_and_transforms() -> None:
    tensors, target = drawn(torch.float64, 0, None, False, 50)
    hidden, weight, _, rows, columns = (t if t is None else t.requires_grad_() for t in tensors)

    def loss(columns: Any, n: int = 9) -> Tensor:
        low = (rows[:n], columns)  # type: ignore[index]
        return fused_linear_cross_entropy(hidden[:n], weight, target[:n], low_rank=low)[0]  # type: ignore[index]

    (expected,) = torch.autograd.grad(loss(columns), columns)  # type: ignore[arg-type]
    followed = torch.func.grad(loss)(columns)
    assert (followed - expected).abs().max() <= 1e3 * torch.finfo(torch.float64).eps
    (nothing,) = torch.autograd.grad(loss(columns, 0), columns)  # type: ignore[arg-type]
    assert not nothing.nan_to_num().any()


@pytest.mark.parametrize(
    ("rows", "columns", "told"),
    [
        ((8, 3), (50, 3), r"\(8, 3\)"),
        ((9, 3), (50, 2), "ranks 3 and 2"),
        ((9,), (50, 1), r"\(9,\)"),
    ],
)
def test_what_does_not_fit(rows: tuple[int, ...], columns: tuple[int, ...], told: str) -> None:
    tensors, target = drawn(torch.float32, 0, None, False, 50)
    with pytest.raises(ValueError, match=told):
        fused_linear_cross_entropy(
            tensors[0],  # type: ignore[arg-type]
            tensors[1],  # type: ignore[arg-type]
            target,
            low_rank=(torch.ones(rows, device=DEVICE), torch.ones(columns, device=DEVICE)),
        )
