"""Forward and backward of a mixture of experts, made of steps that a file of the op computes.

Rows are the S = T K pairs of a token and an expert, sorted by expert; pairs of no expert come last, and no step reads
their rows. Nothing depends on how many rows an expert has, and no step reads a number back.

With d the gradient of the output, of each row p with token t and weight w:

    da[p] = d[t] @ W2[e].T        dw[p] = da[p] . act[p] + d[t] . b2[e]
    dW2[e] = sum_p (w act)[p]^T d[t]      db2[e] = sum_p w d[t]
    dh[p] = w da[p] act'(h[p])    dW1[e] = sum_p x[t]^T dh[p]     db1[e] = sum_p dh[p]     dx[t] = sum_k dh[p] @ W1[e].T

so that neither the output of an expert nor the activation is kept: only x and h, the output of the first product.

With a low rank beside a weight, W + s B A, rows go through A and B, and no step makes a matrix of the size of W. For
rows a that it takes to rows of W a + B u, and their gradient g:

    u = s A a        v = s g @ B        dB[e] = sum_p g[p]^T u[p]        dA[e] = sum_p v[p]^T a[p]        + v @ A in da
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
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
    tokens: Tensor  # (S,) int32, the token of each row
    tiles: Tensor  # what the products of a device need besides; perhaps empty


class LowRank(NamedTuple):
    """Beside a product: rows of a low rank, (S, R), and what they go through, (E, N, R), any strides."""

    rows: Tensor
    b: Tensor


class Steps(Protocol):
    """What a file computes. `weight` is (E, N, M), any strides; rows of no expert hold anything in results."""

    def tiles(self, starts: Tensor, n_rows: int) -> Tensor:
        """`Routing.tiles` for so many rows."""

    def product(
        self,
        a: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        routing: Routing,
        gathered: bool,
        low: LowRank | None = None,
        scale: float | None = None,
    ) -> Tensor:
        """out[p] = scale a[p] @ weight[e].T + low.rows[p] @ low.b[e].T + bias[e], (S, N).

        `gathered`: a has the rows of tokens. `scale`: given for a weight of a low rank.
        """

    def activated(
        self,
        a: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        routing: Routing,
        low: LowRank | None,
        options: MoEOptions,
        keep: bool,
    ) -> tuple[Tensor | None, Tensor]:
        """The `product` with the rows of tokens, which nobody reads unless `keep`, and its activation, (S, I)."""

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
        """dh (S, N), which may take the memory of `into`, w act (S, I), which may take that of da, and dw (T, K) in
        fp32, zero for no expert."""

    def weight_gradient(
        self,
        a: Tensor,
        b: Tensor,
        routing: Routing,
        gathered: tuple[bool, bool],
        dtype: torch.dtype | None = None,
    ) -> Tensor:
        """out[e] = sum_p a[p]^T b[p], (E, M, N); zeros for an expert without rows.

        `dtype`: of the result; given for a weight of a low rank.
        """

    def bias_gradient(
        self, a: Tensor, weights: Tensor | None, routing: Routing, gathered: bool
    ) -> Tensor:
        """out[e] = sum_p weights[slot of p] a[p], (E, N)."""

    def combine(
        self,
        y: Tensor,
        weights: Tensor | None,
        routing: Routing,
        shape: torch.Size,
        dtype: torch.dtype,
    ) -> Tensor:
        """out[t] = sum_k weights[t, k] y[row of (t, k)], (T, H); `shape` is (T, K)."""

    def copy(self, source: Tensor, out: Tensor) -> Tensor:
        """`out`, of the shape of `source` and strides of its own."""


class Separately:
    """`Steps.activated`, one after the other."""

    product: Callable[..., Tensor]

    def activate(self, hidden: Tensor, routing: Routing, options: MoEOptions) -> Tensor:
        """(S, I)"""
        raise NotImplementedError

    def activated(
        self,
        a: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        routing: Routing,
        low: LowRank | None,
        options: MoEOptions,
        keep: bool,
    ) -> tuple[Tensor | None, Tensor]:
        hidden = self.product(a, weight, bias, routing, True, low)
        return hidden, self.activate(hidden, routing, options)


#: of the number of rows, x and the weights
StepsFor = Callable[[int, Tensor, Tensor, Tensor], Steps]


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


def _routing(steps: Steps, sorted_: Iterable[Tensor], top_k: int) -> Routing:
    slots, rows, starts = sorted_
    tokens = torch.div(slots, max(1, top_k), rounding_mode="floor", out=torch.empty_like(rows))
    return Routing(slots, rows, starts, tokens, steps.tiles(starts, slots.numel()))


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
    gate_up_a: Tensor | None,
    gate_up_b: Tensor | None,
    down_a: Tensor | None,
    down_b: Tensor | None,
    *,
    options: MoEOptions,
    needs: Needs,
) -> tuple[Tensor, Saved]:
    steps = steps_for(top_k_index.numel(), x, gate_up_weight, down_weight)
    weights = top_k_weights.contiguous()
    w1, w2 = _as_linear(options, gate_up_weight, down_weight)
    if not can_look(top_k_index):  # or it was checked
        top_k_index, weights = _told(top_k_index, weights, w1.shape[0])
    routing = _routing(steps, sort_by_expert(top_k_index, w1.shape[0]), top_k_index.shape[1])
    first = _Pair.of(steps, gate_up_a, gate_up_b, options.gate_up_scaling, x.dtype)
    second = _Pair.of(steps, down_a, down_b, options.down_scaling, x.dtype)
    low = first and first.beside(steps, x, routing, True)
    keep = keeps_hidden(needs)
    hidden, act = steps.activated(x, w1, gate_up_bias, routing, low, options, keep)
    first_u = low.rows if low and needs[8] else None
    if not keep:
        hidden = None
    low = second and second.beside(steps, act, routing, False)
    y = steps.product(act, w2, down_bias, routing, False, low)  # (S, H)
    second_u = low.rows if low and needs[10] else None
    del act, low
    out = steps.combine(y, weights, routing, weights.shape, x.dtype)
    return out, (
        x,
        gate_up_weight,
        down_weight,
        weights,
        gate_up_bias,
        down_bias,
        gate_up_a,
        gate_up_b,
        down_a,
        down_b,
        hidden,
        first_u,
        second_u,
        *routing[:3],
    )


def keeps_hidden(needs: Needs) -> bool:
    """Whether backward reads the output of the first product; the gradient of `down_bias` comes without it."""
    return any(need for i, need in enumerate(needs) if i != 6)


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
    x, gate_up_weight, down_weight, weights, gate_up_bias, down_bias, a1, b1, *given = given
    a2, b2, hidden, first_u, second_u, *routed, dy = given
    n_rows = weights.numel()
    steps = steps_for(n_rows, x, gate_up_weight, down_weight)
    routing = _routing(steps, routed, weights.shape[1])
    needs_dx, needs_dw1, needs_dw2, _, needs_dw, needs_db1, needs_db2, *needs_low = needs
    w1, w2 = _as_linear(options, gate_up_weight, down_weight)
    first = _Pair.of(steps, a1, b1, options.gate_up_scaling, x.dtype)
    second = _Pair.of(steps, a2, b2, options.down_scaling, x.dtype)
    of_first, of_second = (needs_dw1, *needs_low[:2]), (needs_dw2, *needs_low[2:])
    dy = dy.contiguous()  # (T, H)
    dx = dw = db1 = db2 = None
    firsts: _OfWeight = (None, None, None)
    seconds: _OfWeight = (None, None, None)
    if needs_db2 and down_bias is not None:
        db2 = steps.bias_gradient(dy, weights, routing, True).to(down_bias.dtype)
    if hidden is None:
        return (*(None,) * 6, db2, *(None,) * 4)
    low = second and second.behind(steps, dy, routing, True)
    wanted = (needs_dx or needs_db1 or any(of_first), any(of_second), needs_dw)
    into = hidden if overwrites else None
    da = steps.product(dy, w2.mT, None, routing, True, low)
    dhidden, act, dw = steps.activate_backward(da, hidden, weights, routing, options, wanted, into)
    del da
    if act is not None:
        if second_u is not None:  # of act, where the gradient is that of w act
            second_u = (second_u * weights.view(-1, 1)[routing.slots]).to(x.dtype)
        between = (second_u, low and low.rows)
        gathered = (False, True)
        seconds = _of_weight(steps, act, dy, routing, gathered, options, second, between, of_second)
        del act
    if dw is not None:
        if down_bias is not None:
            dw = dw + _of_bias(dy, down_bias, routing, weights.shape)
        dw = dw.to(weights.dtype)
    if dhidden is not None:
        if needs_db1 and gate_up_bias is not None:
            db1 = steps.bias_gradient(dhidden, None, routing, False).to(gate_up_bias.dtype)
        low = None
        if first and (needs_dx or of_first[1]):
            low = first.behind(steps, dhidden, routing, False)
        if needs_dx:
            dx = steps.product(dhidden, w1.mT, None, routing, False, low)  # (S, H)
            dx = steps.combine(dx, None, routing, weights.shape, x.dtype)
        between = (first_u, low and low.rows)
        gathered = (True, False)
        firsts = _of_weight(steps, x, dhidden, routing, gathered, options, first, between, of_first)
    return dx, firsts[0], seconds[0], None, dw, db1, db2, *firsts[1:], *seconds[1:]


class _Pair(NamedTuple):
    """The matrices of a low rank beside a weight, for rows of some dtype."""

    a: Tensor  # (E, R, in)
    b: Tensor  # (E, out, R)
    scale: float
    given: tuple[Tensor, Tensor]  # a and b, as the gradients are to be

    @staticmethod
    def of(
        steps: Steps, a: Tensor | None, b: Tensor | None, scale: float, dtype: torch.dtype
    ) -> _Pair | None:
        if a is None or b is None:
            return None
        return _Pair(_dense(steps, a, dtype), _dense(steps, b, dtype), scale, (a, b))

    def beside(self, steps: Steps, a: Tensor, routing: Routing, gathered: bool) -> LowRank:
        """For the product of `a` with the weight: u, and B."""
        rows = steps.product(a, self.a, None, routing, gathered, scale=self.scale)
        return LowRank(rows, self.b)

    def behind(self, steps: Steps, g: Tensor, routing: Routing, gathered: bool) -> LowRank:
        """For the product of `g` with the transposed weight: v, and A."""
        rows = steps.product(g, self.b.mT, None, routing, gathered, scale=self.scale)
        return LowRank(rows, self.a.mT)


def _dense(steps: Steps, t: Tensor, dtype: torch.dtype) -> Tensor:
    """PEFT keeps the B of all experts in one matrix, where an expert's numbers lie far apart."""
    turned = t.stride(1) < t.stride(2)
    t = t.mT if turned else t
    if t.dtype != dtype or not t.is_contiguous():
        t = steps.copy(t, torch.empty(t.shape, dtype=dtype, device=t.device))
    return t.mT if turned else t


#: of W, A and B
_OfWeight = tuple[Tensor | None, Tensor | None, Tensor | None]


def _of_weight(
    steps: Steps,
    inputs: Tensor,
    outputs: Tensor,
    routing: Routing,
    gathered: tuple[bool, bool],
    options: MoEOptions,
    pair: _Pair | None,
    between: tuple[Tensor | None, Tensor | None],
    needs: tuple[bool, ...],
) -> _OfWeight:
    """The gradients of a weight and of the pair beside it. `outputs`: their gradient; `between`: u and v."""
    (u, v), of_inputs, of_outputs = between, *gathered
    dw = da = db = None
    if needs[0]:
        dw = _weight_gradient(steps, inputs, outputs, routing, gathered, options.transposed)
    if pair and v is not None and needs[1]:
        da = steps.weight_gradient(v, inputs, routing, (False, of_inputs), pair.given[0].dtype)
        da = _laid_out(steps, da, pair.given[0])
    if pair and u is not None and needs[2]:
        db = steps.weight_gradient(outputs, u, routing, (of_outputs, False), pair.given[1].dtype)
        db = _laid_out(steps, db, pair.given[1])
    return dw, da, db


def _laid_out(steps: Steps, grad: Tensor, like: Tensor) -> Tensor:
    """With the strides of `like`, lest autograd copies it into a matrix of all experts."""
    out = torch.empty_like(like)
    return grad if grad.stride() == out.stride() else steps.copy(grad, out)


def _as_linear(options: MoEOptions, *weights: Tensor) -> tuple[Tensor, ...]:
    """(E, out, in)"""
    return tuple(w.mT for w in weights) if options.transposed else weights


def _weight_gradient(
    steps: Steps,
    inputs: Tensor,
    outputs: Tensor,
    routing: Routing,
    gathered: tuple[bool, bool],
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
