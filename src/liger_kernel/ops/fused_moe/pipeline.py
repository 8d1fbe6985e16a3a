"""Forward and backward of a mixture of experts, made of steps that a file of the op computes.

Rows are the S = T K pairs of a token and an expert, sorted by expert; pairs of no expert come last, and no step reads
their rows. Nothing depends on how many rows an expert has, and no step reads a number back.

With d the gradient of the output, of each row p with token t and weight w:

    da[p] = d[t] @ W2[e].T        dw[p] = da[p] . act[p] + d[t] . b2[e]
    dW2[e] = sum_p (w act)[p]^T d[t]      db2[e] = sum_p w d[t]
    dh[p] = w da[p] act'(h[p])    dW1[e] = sum_p x[t]^T dh[p]     db1[e] = sum_p dh[p]     dx[t] = sum_k dh[p] @ W1[e].T

so that neither the output of an expert nor the activation is kept: only x and h, the output of the first product.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from liger_kernel._core.contract import Grads, Needs, Saved
from liger_kernel.backends import can_look
from liger_kernel.ops.fused_moe.contract import MoEOptions


class Routing(NamedTuple):
    """Who goes where. A slot is a place t K + k of `index`; a row a place among the sorted."""

    slots: Tensor  # (S,) int64, the slot of each row
    rows: Tensor  # (S,) int32, the row of each slot
    starts: Tensor  # (E + 1,) int32, the first row of each expert; the last is the number of rows with an expert
    tiles: Tensor  # what the products of a device need besides; perhaps empty


class Steps(Protocol):
    """What a file computes. `weight` is (E, N, M), any strides; rows of no expert hold anything in results."""

    def tiles(self, starts: Tensor, n_rows: int) -> Tensor:
        """`Routing.tiles` for so many rows."""

    def product(
        self, a: Tensor, weight: Tensor, bias: Tensor | None, routing: Routing, gathered: int
    ) -> Tensor:
        """out[p] = a[p] @ weight[e].T + bias[e], (S, N). `gathered` K: a has the rows of tokens, K slots each."""

    def weight_gradient(
        self, a: Tensor, b: Tensor, routing: Routing, gathered: tuple[int, int]
    ) -> Tensor:
        """out[e] = sum_p a[p]^T b[p], (E, M, N); zeros for an expert without rows."""

    def bias_gradient(
        self, a: Tensor, weights: Tensor | None, routing: Routing, gathered: int
    ) -> Tensor:
        """out[e] = sum_p weights[slot of p] a[p], (E, N)."""

    def activate(self, hidden: Tensor, routing: Routing, options: MoEOptions) -> Tensor:
        """(S, I)"""

    def activate_backward(
        self,
        da: Tensor,
        hidden: Tensor,
        weights: Tensor,
        routing: Routing,
        options: MoEOptions,
        needs: tuple[bool, bool, bool],
        into: Tensor | None,
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """dh (S, N), w act (S, I), which may take the memory of `into` and da, and dw (T, K) in fp32, zero for no
        expert."""

    def combine(
        self,
        y: Tensor,
        weights: Tensor | None,
        routing: Routing,
        shape: torch.Size,
        dtype: torch.dtype,
    ) -> Tensor:
        """out[t] = sum_k weights[t, k] y[row of (t, k)], (T, H); `shape` is (T, K)."""


#: of x and the weights
StepsFor = Callable[[Tensor, Tensor, Tensor], Steps]


def sort_by_expert(index: Tensor, n_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """`Routing.slots`, `rows` and `starts`."""
    # a radix sort goes over the bits of the type
    narrow = torch.uint8 if n_experts < 2**8 else torch.int16 if n_experts < 2**15 else torch.int32
    ids, slots = torch.sort(index.reshape(-1).to(narrow), stable=True)
    experts = torch.arange(n_experts + 1, dtype=narrow, device=index.device)
    starts = torch.searchsorted(ids, experts, out_int32=True)
    rows = torch.empty_like(slots, dtype=torch.int32)
    rows[slots] = torch.arange(slots.numel(), dtype=torch.int32, device=index.device)
    return slots, rows, starts


def _told(index: Tensor, weights: Tensor, n_experts: int) -> tuple[Tensor, Tensor]:
    """An index that is no expert gets the weight NaN, and so its token the output NaN, without stalling the host."""
    wrong = (index < 0) | (index > n_experts)
    return index.masked_fill(wrong, 0), weights.masked_fill(wrong, float("nan"))


def forward(
    steps_for: StepsFor,
    x: Tensor,
    gate_up_weight: Tensor,
    down_weight: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
    gate_up_bias: Tensor | None,
    down_bias: Tensor | None,
    *,
    options: MoEOptions,
    needs: Needs,
) -> tuple[Tensor, Saved]:
    steps, weights = steps_for(x, gate_up_weight, down_weight), top_k_weights.contiguous()
    w1, w2 = _as_linear(options, gate_up_weight, down_weight)
    if not can_look(top_k_index):  # or it was checked
        top_k_index, weights = _told(top_k_index, weights, w1.shape[0])
    sorted_ = sort_by_expert(top_k_index, w1.shape[0])
    routing = Routing(*sorted_, steps.tiles(sorted_[2], top_k_index.numel()))
    hidden = steps.product(x, w1, gate_up_bias, routing, top_k_index.shape[1])  # (S, 2I) or (S, I)
    act = steps.activate(hidden, routing, options)  # (S, I)
    y = steps.product(act, w2, down_bias, routing, 0)  # (S, H)
    del act
    out = steps.combine(y, weights, routing, weights.shape, x.dtype)
    kept = hidden if any(needs[i] for i in (0, 1, 2, 4, 5)) else None
    return out, (
        x,
        gate_up_weight,
        down_weight,
        weights,
        gate_up_bias,
        down_bias,
        kept,
        *routing[:3],
    )


def backward(
    steps_for: StepsFor,
    overwrites: bool,
    grads: Grads,
    saved: Saved,
    *,
    options: MoEOptions,
    needs: Needs,
) -> Grads:
    """`overwrites`: dh may take the memory of h."""
    given: Any = (*saved, grads[0])
    x, gate_up_weight, down_weight, weights, gate_up_bias, down_bias, hidden, *routed, dy = given
    slots, rows, starts = routed
    steps = steps_for(x, gate_up_weight, down_weight)
    routing = Routing(slots, rows, starts, steps.tiles(starts, slots.numel()))
    needs_dx, needs_dw1, needs_dw2, _, needs_dw, needs_db1, needs_db2 = needs
    w1, w2 = _as_linear(options, gate_up_weight, down_weight)
    top_k = weights.shape[1]
    dy = dy.contiguous()  # (T, H)
    dx = dw1 = dw2 = dw = db1 = db2 = None
    if needs_db2 and down_bias is not None:
        db2 = steps.bias_gradient(dy, weights, routing, top_k).to(down_bias.dtype)
    if hidden is None:
        return None, None, None, None, None, None, db2
    da = steps.product(dy, w2.mT, None, routing, top_k)  # (S, I)
    wanted = (needs_dx or needs_dw1 or needs_db1, needs_dw2, needs_dw)
    into = hidden if overwrites else None
    dhidden, act, dw = steps.activate_backward(da, hidden, weights, routing, options, wanted, into)
    del da
    if act is not None:
        dw2 = _weight_gradient(steps, act, dy, routing, (0, top_k), options.transposed)
        del act
    if dw is not None:
        if down_bias is not None:
            dw = dw + _of_bias(dy, down_bias, routing, weights.shape)
        dw = dw.to(weights.dtype)
    if dhidden is not None:
        if needs_db1 and gate_up_bias is not None:
            db1 = steps.bias_gradient(dhidden, None, routing, 0).to(gate_up_bias.dtype)
        if needs_dw1:
            dw1 = _weight_gradient(steps, x, dhidden, routing, (top_k, 0), options.transposed)
        if needs_dx:
            dx = steps.product(dhidden, w1.mT, None, routing, 0)  # (S, H)
            dx = steps.combine(dx, None, routing, weights.shape, x.dtype)
    return dx, dw1, dw2, None, dw, db1, db2


def _as_linear(options: MoEOptions, *weights: Tensor) -> tuple[Tensor, ...]:
    """(E, out, in)"""
    return tuple(w.mT for w in weights) if options.transposed else weights


def _weight_gradient(
    steps: Steps,
    inputs: Tensor,
    outputs: Tensor,
    routing: Routing,
    gathered: tuple[int, int],
    transposed: bool,
) -> Tensor:
    """Of a weight (E, out, in), or transposed (E, in, out)."""
    if transposed:
        return steps.weight_gradient(inputs, outputs, routing, gathered)
    return steps.weight_gradient(outputs, inputs, routing, gathered[::-1])


def _of_bias(dy: Tensor, bias: Tensor, routing: Routing, shape: torch.Size) -> Tensor:
    """d[t] . b2[e] of each slot, zero for no expert; (T, K) in fp32 or wider."""
    of_expert = torch.mm(dy, bias.to(dy.dtype).t())  # (T, E)
    ends = routing.starts[1:].contiguous()
    expert = torch.searchsorted(ends, routing.rows, right=True).view(shape)
    found = of_expert.gather(1, expert.clamp(max=bias.shape[0] - 1))
    wide = torch.promote_types(dy.dtype, torch.float32)
    return found.to(wide).masked_fill(expert == bias.shape[0], 0.0)
