"""Losses of sequences make their logits once, whatever the chunks; where they cannot, the numbers are the same."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from liger_kernel.backends.records import ChunkSizes
from liger_kernel.chunked_loss import (
    LigerFusedLinearDPOLoss,
    LigerFusedLinearGRPOLoss,
    LigerFusedLinearKTOLoss,
    LigerFusedLinearORPOLoss,
)
from liger_kernel.loss_head import plan, products, stripes
from liger_kernel.loss_head.groups import RowGroups, cut, rows_to_visit
from liger_kernel.testing import assert_draws_no_worse, assert_no_worse
from tests.chunked_loss.full_logits import IGNORED, draw_sequences
from tests.chunked_loss.test_grpo import draw_policy

Call = Callable[[dict[str, Any]], tuple[Tensor, tuple[Tensor, ...]]]
BATCH, LENGTH = 6, 7  # of `draw_sequences`
SEQUENCES = [0, 1, 2, 3, 1, 2]  # which of `draw_policy`


def dpo(i: dict[str, Any]) -> Any:
    module = LigerFusedLinearDPOLoss(compute_nll_loss=True, use_ref_model=False)
    return module(i["weight"], i["hidden"], i["target"], i["bias"])


def orpo(i: dict[str, Any]) -> Any:
    return LigerFusedLinearORPOLoss()(i["weight"], i["hidden"], i["target"], i["bias"])


def kto(i: dict[str, Any]) -> Any:
    module, labels = LigerFusedLinearKTOLoss(), torch.arange(BATCH) % 2 == 0
    return module(i["hidden"], i["weight"], i["target"], i["bias"], preference_labels=labels)


def grpo(**options: Any) -> Call:
    def call(i: dict[str, Any]) -> Any:
        policy = draw_policy(torch.float32)(0)
        rest = (policy[name][SEQUENCES] for name in ("mask", "advantages"))
        module = LigerFusedLinearGRPOLoss(use_ref_model=False, temperature=0.8, **options)
        target = i["target"].clamp(min=0)
        old = torch.full(target.shape, -3.0)
        return module(i["hidden"], i["weight"], target, *rest, i["bias"], old_per_token_logps=old)

    return call


CALLS: dict[str, tuple[Call, int]] = {  # and the tokens of a group
    "dpo": (dpo, 2 * LENGTH),
    "orpo": (orpo, 2 * LENGTH),
    "kto": (kto, LENGTH),
    "grpo": (grpo(), 1),
    "sequence": (grpo(importance_sampling_level="sequence"), LENGTH),
    "vespo": (grpo(loss_type="vespo"), LENGTH),
}


def run(call: Call, i: dict[str, Any]) -> list[Tensor]:
    """The loss, its metrics and gradients."""
    i = {name: t.clone() for name, t in i.items()}
    leaves = [i[name].requires_grad_() for name in ("hidden", "weight", "bias")]
    loss, metrics = call(i)
    assert not any(t.requires_grad for t in metrics)
    grads = torch.autograd.grad(loss * 0.7, leaves)
    return [t.detach() for t in (loss, *metrics, *grads)]


def by_name(found: list[Tensor]) -> dict[str, Tensor]:
    return {f"output or gradient {n}": t for n, t in enumerate(found)}


def inputs(dtype: torch.dtype = torch.float32, seed: int = 0) -> dict[str, Any]:
    drawn = draw_sequences(torch.float32, BATCH, reference=False)(1 + seed)
    drawn = {name: t.to(dtype) if t.is_floating_point() else t for name, t in drawn.items()}
    drawn["target"][3] = IGNORED  # a group, or half of one, without tokens
    return drawn


@pytest.fixture
def projected(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The rows of each matrix product that makes logits, in chunks of rows."""
    rows: list[int] = []
    project = products.HeadProducts.project

    def recorded(head: products.HeadProducts, x: Tensor, out: Tensor) -> None:
        rows.append(x.shape[0])
        project(head, x, out)

    monkeypatch.setattr(products.HeadProducts, "project", recorded)
    monkeypatch.setattr(stripes.Stripes, "of", lambda *_: None)
    return rows


def set_rows(monkeypatch: pytest.MonkeyPatch, rows: int) -> None:
    sizes = ChunkSizes(most_rows=rows, fewest_rows=rows, multiple=1)
    monkeypatch.setattr(plan, "chunk_sizes", lambda device: sizes)


def labels_of(name: str, i: dict[str, Any]) -> int:
    if name in ("dpo", "orpo", "kto"):
        return int((i["target"] != IGNORED).sum())
    return int(draw_policy(torch.float32)(0)["mask"][SEQUENCES].sum())


def made_twice(labels: int, rows: int) -> int:
    """Rows of all products that make logits, in forward and in backward, which takes over the last chunk."""
    return 2 * labels - ((labels - 1) % rows + 1)


@pytest.mark.parametrize("rows", [1024, 16, 8])
@pytest.mark.parametrize("name", CALLS)
def test_any_chunks_give_the_same(
    name: str, rows: int, monkeypatch: pytest.MonkeyPatch, projected: list[int]
) -> None:
    call, group = CALLS[name]
    i = inputs()
    labels = labels_of(name, i)
    set_rows(monkeypatch, 3)  # less than half of a group: chunks of 2
    run(call, i)
    assert sum(projected) == (labels if group == 1 else made_twice(labels, 2))
    projected.clear()
    set_rows(monkeypatch, rows)
    run(call, i)
    assert sum(projected) == labels
    assert len(projected) > 1 or rows == 1024
    assert max(projected) <= max(rows, group)

    def draw(seed: int) -> Any:
        found = []
        for chunk, dtype in ((rows, torch.float32), (rows, torch.float64), (3, torch.float32)):
            set_rows(monkeypatch, chunk)
            found.append(by_name(run(call, inputs(dtype, seed))))
        return found

    assert_draws_no_worse(draw)


@pytest.mark.parametrize("name", CALLS)
def test_strides_do_not_matter(name: str) -> None:
    call = CALLS[name][0]
    i = inputs()
    turned = i | {
        "hidden": i["hidden"].transpose(0, 1).contiguous().transpose(0, 1),
        "weight": i["weight"].t().contiguous().t(),
    }
    assert not any(turned[name].clone().is_contiguous() for name in ("hidden", "weight"))
    runs = run(call, turned), run(call, inputs(torch.float64)), run(call, i)
    for n in (0, -3, -2, -1):  # the loss and its gradients
        assert_no_worse(f"output or gradient {n}", *(found[n] for found in runs))


@pytest.mark.parametrize("name", CALLS)
def test_under_autocast(name: str, monkeypatch: pytest.MonkeyPatch, projected: list[int]) -> None:
    """Products in bf16, gradients in the dtype of their parameters; one pass and two give the same."""
    call = CALLS[name][0]
    i = inputs()

    def cast(rows: int, seed: int = 0) -> list[Tensor]:
        set_rows(monkeypatch, rows)
        with torch.autocast("cpu", torch.bfloat16):
            found = run(call, inputs(seed=seed))
        assert all(t.dtype == torch.float32 for t in found)
        return found

    def draw(seed: int) -> Any:
        high = run(call, inputs(torch.float64, seed))
        return [*map(by_name, (cast(16, seed), high, cast(3, seed)))]

    one = cast(16)
    assert sum(projected) == labels_of(name, i)
    assert not torch.equal(one[-2], run(call, i)[-2])  # dW of products in fp32
    assert_draws_no_worse(draw)


@pytest.mark.parametrize("name", CALLS)
def test_float16_waits_for_the_scale_of_its_gradient(
    name: str, monkeypatch: pytest.MonkeyPatch, projected: list[int]
) -> None:
    i = inputs(torch.float16)
    set_rows(monkeypatch, 8)  # where dW makes it two chunks
    run(CALLS[name][0], i)
    labels = labels_of(name, i)
    assert sum(projected) == made_twice(labels, -(-labels // 2))


def test_without_gradients_the_logits_become_none(projected: list[int]) -> None:
    i = inputs()
    with torch.no_grad():
        loss, _ = dpo(i)
    assert not loss.requires_grad
    assert sum(projected) == labels_of("dpo", i)
    frozen, _ = dpo(i)  # nothing asks for one
    assert not frozen.requires_grad
    assert frozen == loss


def test_ranks_meet_once_however_many_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranks with batches of different sizes have different numbers of chunks."""
    met: list[float] = []

    def all_reduce(total: Tensor, op: Any) -> None:
        met.append(float(total))
        total.mul_(3)  # the other rank has twice as many tokens

    high, low = (run(grpo(), inputs(dtype))[3:] for dtype in (torch.float64, torch.float32))
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    monkeypatch.setattr(torch.distributed, "all_reduce", all_reduce)
    set_rows(monkeypatch, 8)
    found = run(grpo(), inputs())
    assert met == [labels_of("grpo", inputs())]
    for mine, exact, alone in zip(found[3:], high, low, strict=True):  # the gradients
        assert_no_worse("gradient", mine, exact * 2 / 3, alone * (2 / 3))


@pytest.mark.parametrize("name", ["dpo", "kto"])
def test_no_tokens(name: str) -> None:
    i = inputs()
    empty = {"hidden": i["hidden"][:, :0], "target": i["target"][:, :0]}
    loss, *_, dx, dw, db = run(CALLS[name][0], i | empty)
    assert loss == 0
    assert dx.shape == (BATCH, 0, 16)
    assert not dw.any()
    assert not db.any()


def test_labels_are_checked() -> None:
    i = inputs()
    i["target"][0, 5] = 37
    with pytest.raises(IndexError, match="target 37 is out of bounds for 37 classes"):
        kto(i | {"weight": i["weight"].requires_grad_()})
    with pytest.raises(ValueError, match=r"weight has shape \(37, 15\)"):
        kto(i | {"weight": i["weight"][:, 1:].clone().requires_grad_()})


def test_groups_stay_whole() -> None:
    parts = [(0, 3), (3, 7), (7, 9)]
    assert cut(9, 4, [2, 1, 0, 4, 2, 0]) == [slice(*at) for at in parts]
    assert cut(4, 4, [2, 2]) == [slice(0, 4)]
    assert cut(9, 1, [9]) == [slice(0, 9)]
    assert cut(9, 5, None) == [slice(0, 5), slice(5, 9)]
    assert cut(0, 5, [0, 0]) == cut(0, 5, []) == cut(0, 5, None) == []


def test_rows_to_visit() -> None:
    pairs = torch.tensor([0, 1, 4, 5, 2, 3, 6, 7])
    groups = RowGroups(4, pairs, lambda losses: (losses.sum(), ()), torch.ones(8))
    target = torch.tensor([1, IGNORED, 1, 1, 1, 1, 1, 1])
    kept, sizes = rows_to_visit(target, IGNORED, None, groups)
    assert kept is not None
    assert kept.tolist() == [0, 4, 5, 2, 3, 6, 7]
    assert sizes == [3, 4]
    elsewhere = rows_to_visit(target.to("meta"), IGNORED, None, groups)  # where looking would stall
    assert elsewhere == (pairs, [4, 4])
    single = RowGroups(1, None, groups.loss_of, groups.neutral)
    assert rows_to_visit(target.to("meta"), IGNORED, None, single) == (None, None)
