"""A mixture of experts as one opaque node of a `torch.compile` graph."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from liger_kernel._core.autograd import refuse_double_backward
from liger_kernel.backends.dispatch import kernels_for
from liger_kernel.ops.fused_moe.checks import check_index
from liger_kernel.ops.fused_moe.contract import MoEOptions
from liger_kernel.ops.fused_moe.pipeline import keeps_hidden

_TENSORS = (
    "Tensor x, Tensor gate_up_weight, Tensor down_weight, Tensor{} top_k_weights, Tensor? gate_up_bias, "
    "Tensor? down_bias, Tensor? gate_up_a, Tensor? gate_up_b, Tensor? down_a, Tensor? down_b"
)
_OPTIONS = (
    "bool[] needs, str activation, bool gated, bool interleaved, bool transposed, float? limit, float alpha, "
    "float up_shift, float gate_up_scaling, float down_scaling"
)
_NEEDS = (0, 1, 2, *range(4, 11))  # the tensors of `fused_moe` that may require a gradient


def call(options: MoEOptions, *tensors: Tensor | None) -> Tensor:
    needs = [torch.is_grad_enabled() and t is not None and t.requires_grad for t in tensors]
    found: Tensor = _op(*tensors, needs, *options.named().values())[0]
    return found


@torch.library.custom_op(
    "liger_kernel::fused_moe",
    mutates_args=(),
    schema=f"({_TENSORS.format(' top_k_index, Tensor')}, {_OPTIONS}) -> "
    f"({', '.join(['Tensor'] * 7)})",
)
def _op(*args: Any) -> tuple[Tensor, ...]:
    """The output, and the last six of what is saved (`contract.py`)."""
    tensors, needs, options = args[:11], args[11], MoEOptions(*args[12:])
    check_index(tensors[3], tensors[1].shape[0])
    kernels = kernels_for("fused_moe", options, *tensors)
    out, saved = kernels.forward(*tensors, options=options, needs=needs)
    return out, *(out.new_empty(0) if t is None else t for t in saved[10:])


@_op.register_fake
def _(x: Tensor, gate_up_weight: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    index, needs, options = rest[1], rest[9], MoEOptions(*rest[10:])
    n_rows, n_experts = index.numel(), gate_up_weight.shape[0]
    features = gate_up_weight.shape[2 if options.transposed else 1]
    hidden = x.new_empty(n_rows, features) if keeps_hidden(needs) else x.new_empty(0)
    low = (
        x.new_empty(n_rows, a.shape[1]) if a is not None and needs[i] else x.new_empty(0)
        for a, i in ((rest[5], 8), (rest[7], 10))
    )
    counts = [index.new_empty(n, dtype=torch.int32) for n in (n_rows, n_experts + 1)]
    return torch.empty_like(x), hidden, *low, index.new_empty(n_rows, dtype=torch.int64), *counts


@torch.library.custom_op(
    "liger_kernel::fused_moe_backward",
    mutates_args=(),
    schema=f"(Tensor dy, {_TENSORS.format('')}, Tensor? hidden, Tensor? gate_up_low, Tensor? down_low, Tensor slots, "
    f"Tensor rows, Tensor starts, {_OPTIONS}) -> ({', '.join(['Tensor'] * len(_NEEDS))})",
)
def _backward_op(dy: Tensor, *args: Any) -> tuple[Tensor, ...]:
    """A gradient for each of `_NEEDS`; an empty tensor where there is none."""
    saved, needs, options = args[:16], args[16], MoEOptions(*args[17:])
    kernels = kernels_for("fused_moe", options, saved[0])
    grads = kernels.backward((dy,), saved, options=options, needs=needs)
    return tuple(dy.new_empty(0) if grads[i] is None else grads[i] for i in _NEEDS)


@_backward_op.register_fake
def _(dy: Tensor, *args: Any) -> tuple[Tensor, ...]:
    needs = args[16]
    found = []
    for t, i in zip(args[:10], _NEEDS, strict=True):
        if t is None or not needs[i]:
            found.append(dy.new_empty(0))
        else:  # low ranks have gradients with their strides
            found.append(torch.empty_like(t) if i > 6 else t.new_empty(t.shape))
    return tuple(found)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    tensors, (ctx.needs, *ctx.options) = inputs[:11], inputs[11:]
    ctx.save_for_backward(*tensors[:3], *tensors[4:], *output[1:])
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
    refuse_double_backward()
    found: list[Tensor | None] = [None] * (12 + len(ctx.options))
    if grads[0] is not None:
        saved = list(ctx.saved_tensors)
        if not keeps_hidden(ctx.needs):
            saved[10] = None
        for at, i in ((11, 8), (12, 10)):
            if not ctx.needs[i]:
                saved[at] = None
        some = _backward_op(grads[0], *saved, ctx.needs, *ctx.options)
        for i, grad in zip(_NEEDS, some, strict=True):
            found[i] = grad if ctx.needs[i] else None
    return tuple(found)


_op.register_autograd(_backward, setup_context=_setup)
