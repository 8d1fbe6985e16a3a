"""The chunk loop as one opaque node of a `torch.compile` graph; eager code has the cheaper `autograd.Function`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from liger_kernel.ops.cross_entropy import check_labels
from liger_kernel.ops.cross_entropy.rows import Options, Outputs
from liger_kernel.ops.fused_linear_cross_entropy import loop

_SCHEMA = """(
    Tensor hidden, Tensor weight, Tensor? bias, Tensor target, Tensor? class_weight, Tensor? row_scale, bool[] needs,
    int ignore_index, float lse_square_scale, float label_smoothing, str reduction, float? softcap, bool token_scaling,
    bool return_z_loss, bool return_token_accuracy, bool return_predicted_tokens, ScalarType dtype,
    ScalarType? accum_dtype, int? chunk_size, int? memory_budget
) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"""
_N_TENSORS = 6
_N_OPTIONS = 6  # of them make an `Options`; the rest a `Settings`


def call(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    class_weight: Tensor | None,
    settings: loop.Settings,
) -> Outputs:
    s, o = settings, settings.options
    loss, z_loss, accuracy, predicted, *_ = _op(
        hidden,
        weight,
        bias,
        target,
        class_weight,
        None,
        [
            torch.is_grad_enabled() and t is not None and t.requires_grad
            for t in (hidden, weight, bias)
        ],
        o.ignore_index,
        o.lse_square_scale,
        o.label_smoothing,
        o.reduction,
        o.softcap,
        o.token_scaling,
        s.return_z_loss,
        s.return_token_accuracy,
        s.return_predicted_tokens,
        s.dtype,
        s.accum_dtype,
        s.chunk_size,
        s.memory_budget,
    )
    return (
        loss,
        z_loss if s.return_z_loss else None,
        accuracy if s.return_token_accuracy else None,
        predicted if s.return_predicted_tokens else None,
    )


@torch.library.custom_op(
    "liger_kernel::fused_linear_cross_entropy", mutates_args=(), schema="".join(_SCHEMA.split("\n"))
)
def _op(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    class_weight: Tensor | None,
    row_scale: Tensor | None,
    needs: Sequence[bool],
    *settings: Any,
) -> tuple[Tensor, ...]:
    """The four outputs and the three gradients; an empty tensor where there is none.

    With reduction "none" the gradients exist only once the gradient of the loss, `row_scale`, is known.
    """
    options = Options(*settings[:_N_OPTIONS])
    check_labels(target, weight.shape[0], options.ignore_index)
    now = options.reduction != "none" or row_scale is not None
    outputs, grads = loop.run(
        hidden,
        weight,
        bias,
        target,
        class_weight,
        loop.Settings(options, *settings[_N_OPTIONS:]),
        [need and now for need in needs],
        row_scale,
    )
    dtypes = (None, outputs[0].dtype, torch.float32, torch.int64, None, None, None)
    return tuple(
        hidden.new_empty(0, dtype=dtype) if t is None else t
        for t, dtype in zip((*outputs, *grads), dtypes, strict=True)
    )


@_op.register_fake
def _fake(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    class_weight: Tensor | None,
    row_scale: Tensor | None,
    needs: Sequence[bool],
    *settings: Any,
) -> tuple[Tensor, ...]:
    options = Options(*settings[:_N_OPTIONS])
    chosen = loop.Settings(options, *settings[_N_OPTIONS:])
    none = options.reduction == "none"
    per_row = target.shape if none else ()
    wide = torch.promote_types(chosen.dtype, torch.float32)
    outputs = (
        hidden.new_empty(per_row, dtype=wide),
        hidden.new_empty(per_row if chosen.return_z_loss else 0, dtype=wide),
        hidden.new_empty(per_row if chosen.return_token_accuracy else 0, dtype=torch.float32),
        hidden.new_empty(target.shape if chosen.return_predicted_tokens else 0, dtype=torch.int64),
    )
    now = not none or row_scale is not None
    grads = (
        t.new_empty(t.shape) if need and now and t is not None else hidden.new_empty(0)
        for t, need in zip((hidden, weight, bias), needs, strict=True)
    )
    return (*outputs, *grads)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.options = inputs[_N_TENSORS:]
    ctx.recompute = Options(*inputs[_N_TENSORS + 1 :][:_N_OPTIONS]).reduction == "none"
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(*(inputs[: _N_TENSORS - 1] if ctx.recompute else output[4:]))


def _backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    found: tuple[Tensor, ...]
    nothing = (None,) * (_N_TENSORS - 3 + len(ctx.options))
    if grads[0] is None:
        return (None, None, None, *nothing)
    if ctx.recompute:
        needs = list(ctx.needs_input_grad[:3])
        found = _op(*ctx.saved_tensors, grads[0], needs, *ctx.options[1:])[4:]
    else:
        found = tuple(grad * grads[0] for grad in ctx.saved_tensors)
    asked = ctx.needs_input_grad[:3]
    return (*(g if need else None for g, need in zip(found, asked, strict=True)), *nothing)


_op.register_autograd(_backward, setup_context=_setup_context)
