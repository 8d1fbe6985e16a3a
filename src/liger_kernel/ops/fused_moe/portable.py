"""A mixture of experts in plain PyTorch, for every device without kernels of its own. See `contract.Kernels`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from liger_kernel._core.autograd import has_numbers
from liger_kernel.backends import can_look
from liger_kernel.ops.fused_moe import pipeline
from liger_kernel.ops.fused_moe.contract import MoEOptions
from liger_kernel.ops.fused_moe.pipeline import LowRank, Routing


def rows_of(a: Tensor, routing: Routing, gathered: bool) -> Tensor:
    return a.index_select(0, routing.tokens) if gathered else a


def _parts(rows: Tensor, routing: Routing) -> Sequence[Tensor]:
    """The rows of each expert, and those of none. Where the host would have to wait for their number, all rows, zero
    where they are those of others."""
    starts = routing.starts
    if can_look(starts):
        n_rows = rows.shape[0]
        firsts = [*starts.tolist(), n_rows]
        return rows.split([end - start for start, end in pairwise(firsts)])
    return [torch.where(own, rows, 0.0) for own in _owned(routing)]


def _owned(routing: Routing) -> Iterator[Tensor]:
    """Of each expert, and of none, whether a row is its own: (S, 1)."""
    starts, n_rows = routing.starts, routing.slots.shape[0]
    row = torch.arange(n_rows, device=starts.device)[:, None]
    for expert in range(starts.shape[0] - 1):
        yield (row >= starts[expert]) & (row < starts[expert + 1])
    yield row >= starts[-1]


class Portable(pipeline.Separately):
    """`pipeline.Steps`"""

    def tiles(self, starts: Tensor, n_rows: int) -> Tensor:
        return starts.new_empty(0)

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
        if not has_numbers(a):  # whose are the rows? of a shape, the loop over experts says nothing
            return a.new_empty(routing.slots.shape[0], weight.shape[1])
        *parts, others = _parts(rows_of(a, routing, gathered), routing)
        found = list(map(torch.mm, parts, weight.mT.unbind()))
        if scale is not None:
            found = [part * scale for part in found]
        if low is not None:
            rows = self.product(a, low.a, None, routing, gathered, scale=low.scale)
            found = list(map(torch.addmm, found, _parts(rows, routing), low.b.mT.unbind()))
            if low.rows is not None:
                low.rows.copy_(rows)
        if bias is not None:
            found = list(map(torch.add, found, bias.to(a.dtype).unbind()))
        found.append(others.new_zeros(others.shape[0], weight.shape[1]))
        if can_look(routing.starts):
            return torch.cat(found)
        out = found[-1]
        for own, part in zip(_owned(routing), found, strict=True):
            out = torch.where(own, part, out)
        return out

    def weight_gradient(
        self,
        a: Tensor,
        b: Tensor,
        routing: Routing,
        gathered: tuple[bool, bool],
        dtype: torch.dtype | None = None,
    ) -> Tensor:
        if not has_numbers(a):
            return a.new_empty(routing.starts.shape[0] - 1, a.shape[1], b.shape[1], dtype=dtype)
        parts = (
            _parts(rows_of(t, routing, n), routing)[:-1]
            for t, n in zip((a, b), gathered, strict=True)
        )
        found = torch.stack([torch.mm(x.t(), y) for x, y in zip(*parts, strict=True)])
        return found if dtype is None else found.to(dtype)

    def bias_gradient(
        self, a: Tensor, weights: Tensor | None, routing: Routing, gathered: bool
    ) -> Tensor:
        rows = rows_of(a, routing, gathered)
        rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
        if weights is not None:
            rows = rows * weights.view(-1, 1)[routing.slots]
        return torch.stack([part.sum(0) for part in _parts(rows, routing)[:-1]])

    def activate(self, hidden: Tensor, routing: Routing, options: MoEOptions) -> Tensor:
        return _Activation(hidden, options).result.to(hidden.dtype)

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
        needs_dh, needs_act, needs_dw = needs
        act = _Activation(hidden, options)
        weight = weights.view(-1, 1)[routing.slots].to(act.result.dtype)  # (S, 1)
        da = da.to(act.result.dtype)
        dh = act.backward(weight * da).to(hidden.dtype) if needs_dh else None
        dw = None
        if needs_dw:
            row = routing.rows.view(weights.shape)
            dw = (da * act.result).sum(-1)[row].masked_fill(row >= routing.starts[-1], 0.0)
        return dh, (weight * act.result).to(hidden.dtype) if needs_act else None, dw

    def combine(
        self,
        y: Tensor,
        weights: Tensor | None,
        routing: Routing,
        shape: torch.Size,
        dtype: torch.dtype,
    ) -> Tensor:
        wide = (
            y[routing.rows].view(*shape, y.shape[1]).to(torch.promote_types(y.dtype, torch.float32))
        )
        if weights is not None:
            wide = wide * weights[..., None]
        no_expert = (routing.rows >= routing.starts[-1]).view(*shape, 1)
        return wide.masked_fill(no_expert, 0.0).sum(1).to(dtype)

    def copy(self, source: Tensor, out: Tensor) -> Tensor:
        return out.copy_(source)


class _Activation:
    """`reference.activate` of rows in fp32 or wider, and its gradient, without autograd."""

    def __init__(self, hidden: Tensor, options: MoEOptions):
        self.options = options
        hidden = hidden.to(torch.promote_types(hidden.dtype, torch.float32))
        self.gate, self.up, limit = hidden, None, options.limit
        if options.gated:
            gate_up = hidden.unflatten(-1, (-1, 2) if options.interleaved else (2, -1))
            self.gate, self.up = gate_up.unbind(-1 if options.interleaved else -2)
        self.z = self.gate if limit is None else self.gate.clamp(max=limit)
        self.z = self.z * options.alpha
        self.value = _VALUES[options.activation](self.z) / options.alpha
        self.result = self.value
        if self.up is not None:
            up = self.up if limit is None else self.up.clamp(-limit, limit)
            self.factor = up + options.up_shift
            self.result = self.value * self.factor

    def backward(self, grad: Tensor) -> Tensor:
        limit = self.options.limit
        dgate = grad if self.up is None else grad * self.factor
        dgate = _SLOPES[self.options.activation](dgate, self.z)
        if limit is not None:
            dgate = dgate.masked_fill(self.gate > limit, 0.0)
        if self.up is None:
            return dgate
        dup = grad * self.value
        if limit is not None:
            dup = dup.masked_fill(self.up.abs() > limit, 0.0)
        at = -1 if self.options.interleaved else -2
        return torch.stack((dgate, dup), at).flatten(-2)


_aten = torch.ops.aten
_VALUES: dict[str, Any] = {
    "silu": torch.nn.functional.silu,
    "gelu_tanh": partial(torch.nn.functional.gelu, approximate="tanh"),
    "gelu": torch.nn.functional.gelu,
    "relu_squared": lambda z: torch.relu(z).square(),
}
_SLOPES: dict[str, Any] = {
    "silu": _aten.silu_backward,
    "gelu_tanh": partial(_aten.gelu_backward, approximate="tanh"),
    "gelu": _aten.gelu_backward,
    "relu_squared": lambda grad, z: grad * 2 * torch.relu(z),
}
_STEPS = Portable()
forward = partial(pipeline.forward, lambda *tensors: _STEPS)
backward = partial(pipeline.backward, lambda *tensors: _STEPS, False)
backward_over = partial(pipeline.backward, lambda *tensors: _STEPS, True)
