"""Norms of q and k that leave their work to the rotation: where they may, and that everybody else gets normed heads."""

from __future__ import annotations

import collections
import copy
import functools
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import liger_kernel
from liger_kernel.testing import Make, assert_no_worse
from liger_kernel.transformers.patching.state import state_of
from liger_kernel.transformers.patching.unnormed import Norm, Unnormed
from tests.transformers.here import hf_class
from tests.transformers.steps import assert_same_step
from tests.transformers.tiny import batch, build

Calls = collections.Counter[str]
Rows = set[tuple[str, str]]
WITH_NORMS = "liger rope with q_norm, k_norm"


def rows(report: Any) -> Rows:
    return {(row.path.rpartition(".")[2], row.by) for row in report.rows if row.kind == "rope"}


@pytest.mark.parametrize("model_type", ["olmo2", "qwen3"])
def test_report_step_and_unpatch(model_type: str, calls: Calls) -> None:
    """Of all heads together, and of each."""
    model = build(model_type)
    assert rows(liger_kernel.patch(model)) == {("self_attn", WITH_NORMS)}
    model = pickle.loads(pickle.dumps(copy.deepcopy(model)))
    calls.clear()
    model(**batch())
    assert (calls["qk_norm_rope"], calls["rope"]) == (2, 0)
    assert_same_step(model_type, torch.float32, model)
    liger_kernel.unpatch(model)
    calls.clear()
    model(**batch())
    assert not calls


@pytest.mark.parametrize(
    "options", [{"rms_norm": False}, {"rope": False}], ids=["no-norms", "no-rope"]
)
def test_either_option_keeps_them_apart(options: dict[str, bool], calls: Calls) -> None:
    model = build("qwen3")
    found = rows(liger_kernel.patch(model, **options))
    assert found == (set() if "rope" in options else {("self_attn", "liger rope")})
    calls.clear()
    model(**batch())
    assert calls["qk_norm_rope"] == 0


def test_through_an_entry_point(calls: Calls) -> None:
    """Whose rotary function is on the modeling file: only attention modules with such norms change."""
    from liger_kernel.transformers import monkey_patch as doors

    for model_type, expected in (("qwen3", {("self_attn", WITH_NORMS)}), ("llama", set())):
        model = build(model_type)
        getattr(doors, f"apply_liger_kernel_to_{model_type}")(model=model)
        state = state_of(model)
        assert state is not None
        assert rows(state.report) == expected
        calls.clear()
        model(**batch())
        assert (calls["qk_norm_rope"], calls["rope"]) == ((2, 0) if expected else (0, 2))
        liger_kernel.unpatch(model)
        calls.clear()
        model(**batch())
        assert not calls


@pytest.mark.usefixtures("one_graph")
def test_compiles_to_one_graph() -> None:
    model = build("qwen3")
    liger_kernel.patch(model)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert compiled(**batch(), use_cache=False).loss.isfinite()


def test_a_hook_sees_normed_heads(calls: Calls) -> None:
    """Then norm and rotation are apart; also where ZeRO-3 gathers a weight for its module alone."""
    model, stock = build("qwen3"), build("qwen3")
    liger_kernel.patch(model)
    seen: list[Any] = []
    for one in (model, stock):
        one.model.layers[0].self_attn.q_norm.register_forward_hook(lambda *a: seen.append(a[-1]))
    calls.clear()
    for one in (model, stock):
        one(**batch())
    assert (calls["qk_norm_rope"], calls["rope"]) == (1, 1)
    assert_no_worse("heads", seen[0], seen[1].double(), seen[1])


# -- forms of attention ------------------------------------------------------------------------------------------------


def rotate_half(x: Tensor) -> Tensor:
    a, b = x.chunk(2, -1)
    return torch.cat((-b, a), -1)


def apply_rotary_pos_emb(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1
) -> tuple[Tensor, Tensor]:
    cos, sin = cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim)
    return q * cos + rotate_half(q) * sin, k * cos + rotate_half(k) * sin


class Attention(nn.Module):
    """`how` is what happens between norm and rotation."""

    head_dim = 8

    def __init__(self, norms: tuple[nn.Module, nn.Module]):
        super().__init__()
        self.q_proj, self.k_proj = nn.Linear(12, 24), nn.Linear(12, 16)
        self.q_norm, self.k_norm = norms

    def between(self, q: Tensor) -> Tensor:
        return q

    def forward(self, hidden_states: Tensor, position_embeddings: tuple[Tensor, Tensor]) -> Any:
        shape = (*hidden_states.shape[:-1], -1, self.head_dim)
        q = self.between(self.q_norm(self.q_proj(hidden_states).view(shape)).transpose(1, 2))
        k = self.k_norm(self.k_proj(hidden_states).view(shape)).transpose(1, 2)
        q, k = apply_rotary_pos_emb(q, k, *position_embeddings)
        return q, k


class Scaled(Attention):
    def between(self, q: Tensor) -> Tensor:
        return q * 2


class Mixed(Attention):
    def between(self, q: Tensor) -> Tensor:
        return torch.cat((q[..., 4:], q[..., :4]), -1)


class Swapped(Attention):
    def between(self, q: Tensor) -> Tensor:
        return q.transpose(-1, -2).contiguous().transpose(-1, -2)


class Later(Attention):
    """Of three tokens, it does something else than of two."""

    def between(self, q: Tensor) -> Tensor:
        return q if q.shape[2] == 2 else q - 1


class Written(Attention):
    """What is written into normed heads is seen in those that are rotated."""

    def between(self, q: Tensor) -> Tensor:
        q.mul_(2)
        q[..., :2] = 0.5
        return q


class WrittenLater(Attention):
    """Of two tokens, nothing is written."""

    def between(self, q: Tensor) -> Tensor:
        if q.shape[2] > 2:
            q.transpose(1, 2)[..., :2] += 1
        return q


class WithoutGradient(Attention):
    def forward(self, hidden_states: Tensor, position_embeddings: tuple[Tensor, Tensor]) -> Any:
        shape = (*hidden_states.shape[:-1], -1, self.head_dim)
        q, k = self.q_proj(hidden_states).view(shape), self.k_proj(hidden_states).view(shape)
        with torch.no_grad():
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = apply_rotary_pos_emb(q.transpose(1, 2), k.transpose(1, 2), *position_embeddings)
        return q + self.q_proj.weight.sum(), k


def norm(eps: float = 1e-6) -> nn.Module:
    made: nn.Module = hf_class("qwen3.Qwen3RMSNorm")(8, eps=eps)
    with torch.no_grad():
        made.weight.copy_(torch.linspace(0.5, 2, 8))  # type: ignore[arg-type]
    return made


@pytest.mark.parametrize("seq", [2, 3])
@pytest.mark.parametrize(
    ("kind", "eps", "waits"),
    [
        (Attention, 1e-6, True),
        (Attention, 1e-2, False),  # another one for k
        (Scaled, 1e-6, False),
        (Mixed, 1e-6, False),
        (Swapped, 1e-6, False),
        (Later, 1e-6, True),
        (Written, 1e-6, False),
        (WrittenLater, 1e-6, True),
        (WithoutGradient, 1e-6, False),
    ],
)
def test_forms(kind: type[Attention], eps: float, waits: bool, seq: int, calls: Calls) -> None:
    torch.manual_seed(0)
    stock = kind((norm(), norm(eps)))
    module = copy.deepcopy(stock)
    model = nn.ModuleDict({"a": module})
    names = " with q_norm, k_norm" if waits else ""
    assert rows(liger_kernel.patch(model)) == {("a", f"liger rope{names}")}
    make = Make(torch.float32)
    x, angles = make.randn(2, seq, 12), make.randn(1, seq, 4).repeat(1, 1, 2)
    calls.clear()
    outputs = []
    for one, dtype in (
        (module, None),
        (copy.deepcopy(stock).double(), torch.float64),
        (stock, None),
    ):
        found = one(x.to(dtype), (angles.cos().to(dtype), angles.sin().to(dtype)))
        sums = [t.sum() for t in found if t.requires_grad]
        grads = torch.autograd.grad(sums, [*one.parameters()], allow_unused=True)
        outputs.append([*found, *(torch.zeros(()) if g is None else g for g in grads)])
    for ours, high, low in zip(*outputs, strict=True):
        assert_no_worse("result", ours, high, low)
    assert calls["qk_norm_rope"] == (waits and not (kind in (Later, WrittenLater) and seq == 3))


# -- heads that are not normed yet -------------------------------------------------------------------------------------

USES: dict[str, Callable[[Any], Any]] = {
    "views": lambda x: x.view(2, 5, 3, 8).transpose(1, 2).reshape(2, 15, 8).materialize(),
    "split further": lambda x: x.view(2, 5, 3, 2, 4) + 0,
    "last columns": lambda x: x[..., 4:],
    "a row across tokens": lambda x: x.reshape(2, 3, 5, 8).transpose(1, 2) * 1,
    "of the last dimension": lambda x: x.transpose(1, -1) * 1,
    "right operand": lambda x: 1 - x,
    "function": lambda x: torch.cat([x, x], 0),
    "keyword": lambda x: torch.mul(input=x, other=x),
    "method": lambda x: x.sum(-1),
    "comparison": lambda x: x > 0,
}


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("together", [False, True], ids=["each", "together"])
def test_any_use_gets_normed_heads(use: str, together: bool) -> None:
    make = Make(torch.float32)
    x = make.randn(2, 5, 24) if together else make.randn(2, 15, 8)
    module = norm()
    if together:
        module.weight = nn.Parameter(make.randn(24))
    normed = module(x)
    heads = Unnormed(
        Norm(1e-6, 0.0, "llama"),
        module,
        module.weight,
        x,
        functools.partial(module, x),  # type: ignore[arg-type]
    )
    assert (heads.shape, heads.dtype, heads.size(-1)) == (x.shape, x.dtype, x.shape[-1])
    stand_in = {"views": lambda t: t.view(2, 5, 3, 8).transpose(1, 2).reshape(2, 15, 8)}
    expected = stand_in.get(use, USES[use])(normed)
    found = USES[use](heads) if use != "views" else heads.view(2, 5, 3, 8).transpose(1, 2)
    if use == "views":
        assert isinstance(found, Unnormed)
        assert found.heads == (1 if together else None)
        found = found.reshape(2, 15, 8)
        found = found.materialize() if isinstance(found, Unnormed) else found
    assert isinstance(found, Tensor)
    assert torch.equal(found, expected)


def test_heads_whose_input_was_overwritten() -> None:
    x, module = Make(torch.float32).randn(2, 5, 8), norm()
    heads = Unnormed(Norm(1e-6, 0.0, "llama"), module, None, x, functools.partial(module, x))
    x.add_(1)
    with pytest.raises(RuntimeError, match=r"overwritten.*rope=False"):
        heads.materialize()
