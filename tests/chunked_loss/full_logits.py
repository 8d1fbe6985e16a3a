"""The losses written down again over logits that are all in memory, in the dtype of the inputs; and the comparison.

Log-probabilities are at least fp32, as everyone computes them from logits of any dtype.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from liger_kernel.testing import assert_draws_no_worse

IGNORED = -100
DRAWS = 12  # compared together, at least: the error of one number may be 0 by luck
DTYPES = [torch.float32, torch.bfloat16]
Inputs = Mapping[str, Any]


def wide(t: Tensor) -> Tensor:
    return t.to(torch.promote_types(t.dtype, torch.float32))


def logits_of(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    logits = hidden @ weight.t()
    return logits if bias is None else logits + bias


def pick(logits: Tensor, target: Tensor, temperature: float = 1.0) -> Tensor:
    logps = (wide(logits) / temperature).log_softmax(-1)
    found = logps.gather(-1, target.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    return torch.where(target == IGNORED, 0.0, found)


def sequences(tokens: Tensor, target: Tensor, average: bool) -> Tensor:
    valid = (target != IGNORED).sum(1)
    return torch.stack(
        [tokens[i].sum() / (max(int(n), 1) if average else 1) for i, n in enumerate(valid.tolist())]
    )


def paired(
    pair_loss: Callable[..., tuple[Tensor, ...]],
    inputs: Inputs,
    average: bool,
    alpha: float = 1.0,
    nll: bool = False,
) -> tuple[Tensor, ...]:
    """`pair_loss(c, r, ref_c, ref_r)` for one pair: (loss, *metrics)."""
    target = inputs["target"]
    logits = logits_of(inputs["hidden"], inputs["weight"], inputs.get("bias"))
    tokens = pick(logits, target)
    logps = sequences(tokens, target, average)
    ref = torch.zeros_like(logps)
    if "ref_hidden" in inputs:
        ref_logits = logits_of(inputs["ref_hidden"], inputs["ref_weight"], inputs.get("ref_bias"))
        ref = sequences(pick(ref_logits, target), target, average).detach()
    pairs = len(target) // 2
    rows = []
    for i in range(pairs):
        row = pair_loss(logps[i], logps[i + pairs], ref[i], ref[i + pairs])
        empty = (target[i] == IGNORED).all() or (target[i + pairs] == IGNORED).all()
        rows.append([torch.zeros_like(x) for x in row] if empty else row)
    losses, *metrics = (torch.stack(column) for column in zip(*rows, strict=True))
    loss = losses.mean()
    nll_loss = torch.zeros_like(loss)
    if nll:
        labels = inputs.get("nll_target", target)[:pairs]
        nll_loss = -pick(logits[:pairs], labels).sum() / (labels != IGNORED).sum().clamp(min=1)
    means = [wide(half).mean() for half in (logits[:pairs], logits[pairs:])]
    return loss + alpha * nll_loss, logps[:pairs], logps[pairs:], *means, nll_loss, *metrics


def compare(
    ours: Callable[[Inputs], tuple[Tensor, ...]],
    reference: Callable[[Inputs], tuple[Tensor, ...]],
    draw: Callable[[int], Inputs],
    wanted: tuple[str, ...] = ("hidden", "weight", "bias"),
) -> None:
    """Outputs (the first is the loss) and gradients of `wanted` against float64, over several draws."""

    def one(seed: int) -> Any:
        runs = (
            evaluate(function, draw(seed), wanted, dtype)
            for function, dtype in ((ours, None), (reference, torch.float64), (reference, None))
        )
        return [{f"output or gradient {i}": t for i, t in enumerate(run)} for run in runs]

    assert_draws_no_worse(one, first=DRAWS, last=16 * DRAWS)


def evaluate(
    function: Callable[[Inputs], tuple[Tensor, ...]],
    inputs: Inputs,
    wanted: tuple[str, ...],
    dtype: torch.dtype | None = None,
) -> list[Tensor]:
    given = {
        name: t.detach().to(dtype) if dtype and torch.is_tensor(t) and t.is_floating_point() else t
        for name, t in inputs.items()
    }
    leaves = [given[name].requires_grad_() for name in wanted if name in given]
    outputs = function(given)
    assert not any(t.requires_grad for t in outputs[1:]) or dtype or function.__name__ != "ours"
    grads = torch.autograd.grad(outputs[0] * 0.75, leaves) if leaves else ()
    assert all(g.dtype == t.dtype for g, t in zip(grads, leaves, strict=True))
    return [t.detach() for t in (*outputs, *grads)]


def draw_sequences(
    dtype: torch.dtype,
    batch: int = 4,
    reference: bool = True,
    bias: bool = True,
    sizes: tuple[int, int, int] = (7, 16, 37),
) -> Callable[[int], dict[str, Any]]:
    """hidden (B, T, H), weight, target with ignored tokens, bias, and a reference model near the policy.

    sizes: T, H and V."""
    length, width, classes = sizes

    def draw(seed: int) -> dict[str, Any]:
        g = torch.Generator().manual_seed(seed)
        hidden = torch.randn(batch, length, width, generator=g)
        weight = torch.randn(classes, width, generator=g) * 0.5
        target = torch.randint(classes, (batch, length), generator=g)
        target[:, : 1 + seed % 3] = IGNORED
        found = {"hidden": hidden, "weight": weight}
        if bias:
            found["bias"] = torch.randn(classes, generator=g) * 0.3
        if reference:
            found["ref_hidden"] = hidden + 0.1 * torch.randn(hidden.shape, generator=g)
            found["ref_weight"] = weight + 0.03 * torch.randn(weight.shape, generator=g)
            if bias:
                found["ref_bias"] = found["bias"] + 0.1 * torch.randn(classes, generator=g)
        return {name: t.to(dtype) for name, t in found.items()} | {"target": target}

    return draw
