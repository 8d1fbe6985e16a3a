"""Kernels of the router: one pass over the logits each way, with the choice in registers."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from liger_kernel._core.contract import Grads, Needs, Saved
from liger_kernel._core.shapes import cdiv, next_power_of_2
from liger_kernel.backends.kernels import launch
from liger_kernel.ops.moe_router.contract import RouterOptions

_ELEMENTS = 2048  # of a tile; four warps, so 16 in each thread. Not measured
_MOST = (
    1024  # experts: more would leave a tile one row, which top-k goes over again for each choice
)


@triton.jit
def _scores(logits_ptr, rows, cols, mask, n_experts, SOFTMAX: tl.constexpr):
    x = tl.load(logits_ptr + rows * n_experts + cols, mask=mask, other=0.0).to(tl.float32)
    if SOFTMAX:
        x = tl.where(cols < n_experts, x, -float("inf"))
        e = tl.exp(x - tl.max(x, 1)[:, None])
        return tl.where(mask, e / tl.sum(e, 1)[:, None], 0.0)
    return tl.where(mask, 1.0 / (1.0 + tl.exp(tl.minimum(-x, 80.0))), 0.0)


@triton.jit
def _router_fwd(
    logits_ptr,
    bias_ptr,
    weights_ptr,
    index_ptr,
    n_rows,
    n_experts,
    scale,
    SOFTMAX: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    GROUPS: tl.constexpr,
    KEPT: tl.constexpr,
    NORMALIZE: tl.constexpr,
    TOP_K: tl.constexpr,
    SLOTS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The TOP_K best of score + bias of each row, within the KEPT groups whose two best add up to most; their scores,
    over their sum with NORMALIZE, times scale. A program owns ROWS rows. SLOTS, BLOCK: powers of 2 that hold all."""
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    cols = tl.arange(0, BLOCK)[None, :]
    mask = (rows < n_rows) & (cols < n_experts)
    scores = _scores(logits_ptr, rows, cols, mask, n_experts, SOFTMAX)
    choice = scores
    if HAS_BIAS:
        choice += tl.load(bias_ptr + cols, mask=cols < n_experts, other=0.0).to(tl.float32)
    choice = tl.where(cols < n_experts, choice, -float("inf"))
    if KEPT < GROUPS:
        SIZE: tl.constexpr = BLOCK // GROUPS
        groups = tl.reshape(choice, (ROWS, GROUPS, SIZE))
        best = tl.max(groups, 2)
        if SIZE > 1:
            at = tl.argmax(groups, 2)[:, :, None] == tl.arange(0, SIZE)[None, None, :]
            best += tl.max(tl.where(at, -float("inf"), groups), 2)
        group = tl.arange(0, GROUPS)[None, :]
        kept = tl.zeros((ROWS, GROUPS), tl.int32) > 0  # Triton 3.2's interpreter knows no int1
        for _ in tl.static_range(KEPT):
            hit = group == tl.argmax(best, 1)[:, None]
            kept = kept | hit
            best = tl.where(hit, -float("inf"), best)
        groups = tl.where(kept[:, :, None], groups, -float("inf"))
        choice = tl.reshape(groups, (ROWS, BLOCK))
    slots = tl.arange(0, SLOTS)[None, :]
    weights = tl.zeros((ROWS, SLOTS), tl.float32)
    index = tl.zeros((ROWS, SLOTS), tl.int64)
    for k in tl.static_range(TOP_K):
        best_at = tl.argmax(choice, 1)[:, None]
        hit = cols == best_at
        score = tl.sum(tl.where(hit, scores, 0.0), 1)[:, None]
        weights = tl.where(slots == k, score, weights)
        index = tl.where(slots == k, best_at.to(tl.int64), index)
        choice = tl.where(hit, -float("inf"), choice)
    if NORMALIZE:
        weights /= tl.sum(weights, 1)[:, None] + 1e-20
    at = rows * TOP_K + slots
    mask = (rows < n_rows) & (slots < TOP_K)
    tl.store(weights_ptr + at, (weights * scale).to(weights_ptr.dtype.element_ty), mask=mask)
    tl.store(index_ptr + at, index, mask=mask)


@triton.jit
def _router_bwd(
    dweights_ptr,
    logits_ptr,
    index_ptr,
    dlogits_ptr,
    n_rows,
    n_experts,
    scale,
    SOFTMAX: tl.constexpr,
    NORMALIZE: tl.constexpr,
    TOP_K: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """With s the scores and S the sum of the chosen ones: ds = scale (dw - sum dw s / S) / S, or scale dw; dlogits =
    s (ds - sum ds s) for a softmax, ds s (1 - s) for a sigmoid. A program owns ROWS rows."""
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    cols = tl.arange(0, BLOCK)[None, :]
    mask = (rows < n_rows) & (cols < n_experts)
    scores = _scores(logits_ptr, rows, cols, mask, n_experts, SOFTMAX)
    ds = tl.zeros((ROWS, BLOCK), tl.float32)
    chosen = tl.zeros((ROWS, BLOCK), tl.int32) > 0
    for k in tl.static_range(TOP_K):
        at = rows * TOP_K + k
        hit = cols == tl.load(index_ptr + at, mask=rows < n_rows, other=0)
        dweight = tl.load(dweights_ptr + at, mask=rows < n_rows, other=0.0).to(tl.float32)
        ds = tl.where(hit, dweight * scale, ds)
        chosen = chosen | hit
    if NORMALIZE:
        total = tl.sum(tl.where(chosen, scores, 0.0), 1)[:, None] + 1e-20
        ds = tl.where(chosen, (ds - tl.sum(ds * scores, 1)[:, None] / total) / total, 0.0)
    if SOFTMAX:
        dlogits = scores * (ds - tl.sum(ds * scores, 1)[:, None])
    else:
        dlogits = ds * scores * (1.0 - scores)
    at = rows * n_experts + cols
    tl.store(dlogits_ptr + at, dlogits.to(dlogits_ptr.dtype.element_ty), mask=mask)


def unserved(logits: Tensor, bias: Tensor | None, *, options: RouterOptions) -> str | None:
    n_experts, groups = logits.shape[-1], options.n_groups
    if n_experts > _MOST:
        return f"more than {_MOST} experts"
    even = next_power_of_2(n_experts) == n_experts and next_power_of_2(groups) == groups
    return None if even or options.groups_kept == groups else "groups that are no powers of 2"


def _launch(
    kernel: Any, options: RouterOptions, logits: Tensor, *args: Any, **constants: Any
) -> None:
    n_rows, n_experts = logits.shape
    block = next_power_of_2(n_experts)
    rows = max(1, _ELEMENTS // block)
    if n_rows:
        launch(
            kernel,
            (cdiv(n_rows, rows),),
            *args,
            n_rows,
            n_experts,
            options.scale,
            SOFTMAX=options.score == "softmax",
            **constants,
            ROWS=rows,
            BLOCK=block,
            num_warps=4,
        )


def forward(
    logits: Tensor, bias: Tensor | None, *, options: RouterOptions, needs: Needs
) -> tuple[tuple[Tensor, Tensor], Saved]:
    weights = logits.new_empty(logits.shape[0], options.top_k)
    index = torch.empty_like(weights, dtype=torch.int64)
    _launch(
        _router_fwd,
        options,
        logits,
        *(logits, bias, weights, index),
        HAS_BIAS=bias is not None,
        GROUPS=options.n_groups,
        KEPT=options.groups_kept,
        NORMALIZE=options.normalize,
        TOP_K=options.top_k,
        SLOTS=next_power_of_2(options.top_k),
    )
    return (weights, index), (logits, index)


def backward(grads: Grads, saved: Saved, *, options: RouterOptions, needs: Needs) -> Grads:
    dweights: Any = grads[0]
    logits, index = saved
    if dweights is None or logits is None:
        return None, None
    dlogits = torch.empty_like(logits)
    _launch(
        _router_bwd,
        options,
        logits,
        *(dweights.contiguous(), logits, index, dlogits),
        NORMALIZE=options.normalize,
        TOP_K=options.top_k,
    )
    return dlogits, None
