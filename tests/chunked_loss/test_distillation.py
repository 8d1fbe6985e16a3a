"""Distillation losses against the same maths on full logits."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch

from liger_kernel.chunked_loss import (
    LigerFusedLinearCosineSimilarityLoss,
    LigerFusedLinearJSDLoss,
    LigerFusedLinearTVDLoss,
)
from liger_kernel.chunked_loss.fused_linear_distillation import LigerFusedLinearDistillationBase
from tests.chunked_loss.full_logits import DTYPES, IGNORED, compare, logits_of, pick, wide

dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def draw_pair(dtype: torch.dtype, extra: int = 0, shape: tuple[int, ...] = (11,)) -> Any:
    """A student of width 16 and a teacher of width 24 with `extra` more classes, or fewer."""
    classes = 29

    def draw(seed: int) -> Any:
        g = torch.Generator().manual_seed(seed)
        found = {
            "hidden": torch.randn(*shape, 16, generator=g),
            "weight": torch.randn(classes, 16, generator=g) * 0.4,
            "bias": torch.randn(classes, generator=g) * 0.3,
            "t_hidden": torch.randn(*shape, 24, generator=g),
            "t_weight": torch.randn(classes + extra, 24, generator=g) * 0.4,
            "t_bias": torch.randn(classes + extra, generator=g) * 0.3,
        }
        target = torch.randint(classes, shape, generator=g)
        target.view(-1)[seed % 4 :: 3] = IGNORED
        return {name: t.to(dtype) for name, t in found.items()} | {"target": target}

    return draw


def call(module: Any, i: Any) -> Any:
    found = module(
        student_input=i["hidden"],
        student_weight=i["weight"],
        teacher_input=i["t_hidden"],
        teacher_weight=i["t_weight"],
        true_labels=i["target"],
        student_bias=i.get("bias"),
        teacher_bias=i.get("t_bias"),
    )
    return found if isinstance(found, tuple) else (found,)


def jsd(s: Any, t: Any, beta: float) -> Any:
    p, q = s.log_softmax(-1), t.log_softmax(-1)
    if beta == 0:
        return (q.exp() * (q - p)).sum(-1)
    if beta == 1:
        return (p.exp() * (p - q)).sum(-1)
    m = ((1 - beta) * p.exp() + beta * q.exp()).log()
    return beta * (q.exp() * (q - m)).sum(-1) + (1 - beta) * (p.exp() * (p - m)).sum(-1)


def cosine(s: Any, t: Any, beta: float) -> Any:
    return beta * (1 - (s * t).sum(-1) / (s.norm(dim=-1) * t.norm(dim=-1)))


def tvd(s: Any, t: Any, beta: float) -> Any:
    return 0.5 * (s.softmax(-1) - t.softmax(-1)).abs().sum(-1)


def full(i: Any, rows: Any, hard: float, soft: float, beta: float, temperature: float) -> Any:
    s = logits_of(i["hidden"], i["weight"], i.get("bias"))
    t = wide(logits_of(i["t_hidden"], i["t_weight"], i.get("t_bias"))) / temperature
    valid = i["target"] != IGNORED
    n = valid.sum().clamp(min=1)
    hard_loss = -pick(s, i["target"]).sum() / n
    s = wide(s) / temperature
    size = max(s.shape[-1], t.shape[-1])  # what one of the two does not know is a logit of 0
    s, t = (torch.cat([x, x.new_zeros(*x.shape[:-1], size - x.shape[-1])], -1) for x in (s, t))
    soft_loss = rows(s, t, beta)[valid].sum() / n
    return hard * hard_loss + soft * soft_loss, soft_loss.detach(), hard_loss.detach()


@dtypes
@pytest.mark.parametrize(
    ("options", "extra"),
    [
        ({}, 0),
        ({"beta": 0.0, "chunk_size": 4}, 0),
        ({"beta": 1.0, "chunk_size": 4}, 0),
        ({"beta": 0.3, "temperature": 2.0, "chunk_size": 3}, 0),
        ({"weight_hard_loss": 0.0, "weight_soft_loss": 1.0, "chunk_size": 1}, 0),
        ({"weight_hard_loss": 0.8, "weight_soft_loss": 0.1, "chunk_size": 5}, 3),
        ({"temperature": 2.0, "chunk_size": 4}, -4),
        ({"beta": 1.0}, -4),
    ],
    ids=str,
)
@pytest.mark.parametrize(
    ("kind", "rows"),
    [(LigerFusedLinearJSDLoss, jsd), (LigerFusedLinearCosineSimilarityLoss, cosine)],
    ids=["jsd", "cosine"],
)
def test_distillation(
    kind: Any, rows: Any, options: dict[str, Any], extra: int, dtype: torch.dtype
) -> None:
    module = kind(**options, return_soft_hard_loss=True)
    weights = module.weight_hard_loss, module.weight_soft_loss, module.beta, module.temperature
    compare(lambda i: call(module, i), lambda i: full(i, rows, *weights), draw_pair(dtype, extra))


@dtypes
@pytest.mark.parametrize(
    ("options", "extra"),
    [({"chunk_size": 4}, 0), ({"temperature": 2.0, "weight_hard_loss": 0.8}, 3)],
    ids=str,
)
def test_total_variation(options: dict[str, Any], extra: int, dtype: torch.dtype) -> None:
    module = LigerFusedLinearTVDLoss(**options, return_soft_hard_loss=True)
    weights = module.weight_hard_loss, module.weight_soft_loss, 0.0, module.temperature
    compare(lambda i: call(module, i), lambda i: full(i, tvd, *weights), draw_pair(dtype, extra))


@dtypes
@pytest.mark.parametrize("wanted", [("hidden",), ("weight",), ("bias",), ()])
def test_frozen_and_batched(wanted: tuple[str, ...], dtype: torch.dtype) -> None:
    module = LigerFusedLinearJSDLoss(chunk_size=4)
    compare(
        lambda i: call(module, i),
        lambda i: full(i, jsd, 0.5, 0.5, 0.5, 1.0)[:1],
        draw_pair(dtype, shape=(2, 5)),
        wanted,
    )


@pytest.mark.parametrize("kind", [LigerFusedLinearJSDLoss, LigerFusedLinearCosineSimilarityLoss])
def test_all_ignored(kind: Any) -> None:
    i = draw_pair(torch.float32)(0)
    i["target"][:] = IGNORED
    hidden, weight = i["hidden"].requires_grad_(), i["weight"].requires_grad_()
    (loss,) = call(kind(), i)
    loss.backward()
    assert loss == 0
    assert not hidden.grad.any()
    assert not weight.grad.any()
    with torch.no_grad():
        assert not call(kind(), i)[0].requires_grad


@pytest.mark.parametrize("kind", [LigerFusedLinearJSDLoss, LigerFusedLinearCosineSimilarityLoss])
def test_logits_of_the_teacher(kind: Any) -> None:
    """In place of its hidden states and head, and not held for backward."""
    i = draw_pair(torch.float32, extra=3, shape=(2, 5))(0)
    leaves = [i[name].requires_grad_() for name in ("hidden", "weight", "bias")]
    module = kind(temperature=2.0, chunk_size=4)
    expected = call(module, i)[0]
    logits = logits_of(i["t_hidden"], i["t_weight"], i["t_bias"])
    seen = weakref.ref(logits)
    found = call(module, {**i, "t_hidden": logits, "t_weight": None, "t_bias": None})[0]
    del logits
    assert seen() is None
    assert torch.allclose(found, expected)
    grads = (torch.autograd.grad(loss, leaves) for loss in (found, expected))
    assert all(map(torch.allclose, *grads))


class Own(LigerFusedLinearDistillationBase):
    """A loss of a user, written against the base class."""

    @staticmethod
    def distillation_loss_fn(
        student_logits: Any,
        teacher_logits: Any,
        target: Any = None,
        ignore_index: Any = -100,
        **kw: Any,
    ) -> Any:
        rows = (student_logits - teacher_logits).square().sum(-1)
        return rows[target != ignore_index].sum()

    @classmethod
    def forward(cls, ctx: Any, x: Any, w: Any, tx: Any, tw: Any, y: Any, b: Any, tb: Any) -> Any:
        return super().forward(
            cls=cls,
            ctx=ctx,
            student_input=x,
            student_weight=w,
            teacher_input=tx,
            teacher_weight=tw,
            target=y,
            student_bias=b,
            teacher_bias=tb,
            chunk_size=4,
            ignore_index=IGNORED,
            weight_hard_loss=0.5,
            weight_soft_loss=0.5,
            beta=0.5,
            compute_ce_loss=False,
            temperature=1.0,
            compiled=False,
        )

    @staticmethod
    def backward(ctx: Any, grad: Any, *args: Any) -> Any:
        found = LigerFusedLinearDistillationBase.backward(ctx, grad, *args)
        return (*found[:6], None)


def test_own_loss() -> None:
    compare(
        lambda i: (
            Own.apply(
                *(i[n] for n in ("hidden", "weight", "t_hidden", "t_weight", "target")),
                i["bias"],
                i["t_bias"],
            ),
        ),
        lambda i: full(i, lambda s, t, _: (s - t).square().sum(-1), 0.0, 0.5, 0.5, 1.0)[:1],
        draw_pair(torch.float32),
    )


def of_own(i: Any) -> Any:
    names = ("hidden", "weight", "t_hidden", "t_weight", "target", "bias", "t_bias")
    return Own.apply(*(i[name] for name in names))


def test_own_loss_of_a_compiled_step() -> None:
    """It runs outside of the graph."""
    i = draw_pair(torch.float32)(0)
    leaves = [i[name].requires_grad_() for name in ("hidden", "weight", "bias")]
    torch._dynamo.reset()
    compiled = torch.compile(lambda: of_own(i) * 0.5, backend="aot_eager")
    found, expected = (
        [loss.detach(), *torch.autograd.grad(loss, leaves)]
        for loss in (compiled(), of_own(i) * 0.5)
    )
    assert all(map(torch.equal, found, expected))


def test_own_loss_is_not_followed_by_torch_func() -> None:
    i = draw_pair(torch.float32)(0)
    with pytest.raises(RuntimeError, match=r"^Own makes .* FormulaLoss"):
        torch.func.grad(lambda hidden: of_own({**i, "hidden": hidden}))(i["hidden"])


def test_arguments() -> None:
    i = draw_pair(torch.float32)(0)
    with pytest.raises(ValueError, match="temperature must be positive, got 0"):
        LigerFusedLinearJSDLoss(temperature=0)
    with pytest.raises(ValueError, match=r"beta=1\.5"):
        call(LigerFusedLinearJSDLoss(beta=1.5), i)
    with pytest.raises(ValueError, match=r"chunk_size.*got 0"):
        LigerFusedLinearJSDLoss(chunk_size=0)
    with pytest.raises(ValueError, match="teacher_input has shape"):
        call(LigerFusedLinearJSDLoss(), {**i, "t_hidden": i["t_hidden"][:4]})
    with pytest.raises(TypeError, match=r"bfloat16.*float32"):
        call(LigerFusedLinearJSDLoss(), {**i, "hidden": i["hidden"].bfloat16()})
