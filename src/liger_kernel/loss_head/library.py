"""The chunk loop as one opaque node of a `torch.compile` graph, for every row loss that has a name."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from liger_kernel._core.autograd import refuse_double_backward
from liger_kernel.loss_head import loop
from liger_kernel.loss_head.losses import row_loss_class
from liger_kernel.loss_head.plan import ChunkOptions
from liger_kernel.loss_head.products import GivenRows, HeadInputs, LowRank
from liger_kernel.loss_head.row_loss import MOST_OUTPUTS, RowLoss
from liger_kernel.ops.cross_entropy import check_labels

_SCHEMA = """(
    Tensor hidden, Tensor weight, Tensor? bias, Tensor? low_rows, Tensor? low_columns,
    Tensor target, Tensor? class_weight, Tensor? teacher_hidden, Tensor? teacher_weight,
    Tensor? teacher_bias, Tensor? row_scale, bool[] needs,
    str loss, str kinds, int[] ints, float[] floats, str[] strings,
    ScalarType dtype, ScalarType? teacher_dtype, ScalarType? accum_dtype, int? chunk_size, int? memory_budget
) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"""
_N_TENSORS = 11
#: of them the first: hidden, weight, bias, and what is added to the logits
_N_GRADIENTS = 5


def _encoded(loss: RowLoss) -> tuple[str, str, list[int], list[float], list[str]]:
    """The name of the loss, a letter for the kind of each option, and the options by kind."""
    kinds = ""
    ints: list[int] = []
    floats: list[float] = []
    strings: list[str] = []
    for value in loss.named().values():
        if value is None:
            kinds += "n"
        elif isinstance(value, bool):
            kinds, ints = kinds + "b", [*ints, int(value)]
        elif isinstance(value, float):
            kinds, floats = kinds + "f", [*floats, value]
        elif isinstance(value, str):
            kinds, strings = kinds + "s", [*strings, value]
        else:
            kinds, ints = kinds + "i", [*ints, value]
    return type(loss).name, kinds, ints, floats, strings


def _decoded(
    name: str, kinds: str, ints: Sequence[int], floats: Sequence[float], strings: Sequence[str]
) -> RowLoss:
    of_kind = {"f": iter(floats), "s": iter(strings)}
    integers = iter(ints)
    values = (
        None
        if kind == "n"
        else bool(next(integers))
        if kind == "b"
        else next(integers)
        if kind == "i"
        else next(of_kind[kind])
        for kind in kinds
    )
    cls = row_loss_class(name)
    loss: RowLoss = cls(**dict(zip(cls.__match_args__, values, strict=True)))
    return loss


def call(
    loss: RowLoss,
    student: HeadInputs,
    target: Tensor,
    class_weight: Tensor | None,
    chunks: ChunkOptions,
    teacher: HeadInputs | GivenRows | None,
) -> tuple[Any, ...]:
    *tensors, dtype, low = student
    # element by element: Dynamo of torch 2.11 adds no named tuple to a tuple
    tensors += (None, None) if low is None else (low[0], low[1])
    t_hidden = t_weight = t_bias = t_dtype = None
    if teacher is not None:  # nor does that of torch 2.6 slice one
        t_hidden, t_weight, t_bias, t_dtype = teacher[0], teacher[1], teacher[2], teacher[3]
    needs = [torch.is_grad_enabled() and t is not None and t.requires_grad for t in tensors]
    found = _op(
        *tensors,
        target,
        class_weight,
        t_hidden,
        t_weight,
        t_bias,
        None,
        needs,
        *_encoded(loss),
        dtype,
        t_dtype,
        chunks.accum_dtype,
        chunks.chunk_size,
        chunks.memory_budget,
    )
    likes = loss.output_likes(target, torch.promote_types(dtype, torch.float32))
    return tuple(
        None if like[0] is None else t for t, like in zip(found[: len(likes)], likes, strict=True)
    )


@torch.library.custom_op(
    "liger_kernel::linear_loss", mutates_args=(), schema="".join(_SCHEMA.split("\n"))
)
def _op(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    low_rows: Tensor | None,
    low_columns: Tensor | None,
    target: Tensor,
    class_weight: Tensor | None,
    teacher_hidden: Tensor | None,
    teacher_weight: Tensor | None,
    teacher_bias: Tensor | None,
    row_scale: Tensor | None,
    needs: Sequence[bool],
    *options: Any,
) -> tuple[Tensor, ...]:
    """At most `MOST_OUTPUTS` outputs, and the `_N_GRADIENTS`; an empty tensor where there is none.

    With reduction "none" the gradients exist only once the gradient of the loss, `row_scale`, is known.
    """
    loss, dtype, teacher_dtype, chunks = _options(options)
    check_labels(target, loss.whole_vocabulary(weight.shape[0]), loss.ignore_index)
    teacher: HeadInputs | GivenRows | None = None
    if teacher_hidden is not None and teacher_weight is not None:
        teacher = HeadInputs(teacher_hidden, teacher_weight, teacher_bias, teacher_dtype)
    elif teacher_hidden is not None:
        teacher = GivenRows.of(
            teacher_hidden, teacher_bias, target, weight.shape[0], loss.ignore_index
        )
    low = None
    if low_rows is not None and low_columns is not None:
        low = LowRank(low_rows, low_columns)
    now = not loss.recomputes or row_scale is not None
    with _autograd_within_an_op():
        _, outputs, grads = loop.run(
            loss,
            HeadInputs(hidden, weight, bias, dtype, low),
            target,
            class_weight,
            chunks,
            [need and now for need in needs],
            row_scale,
            teacher,
        )
    likes = loss.output_likes(target, torch.promote_types(dtype, torch.float32))
    dtypes = [like[1] for like in likes] + [hidden.dtype] * (MOST_OUTPUTS - len(likes))
    missing = (None,) * (_N_GRADIENTS - len(grads))
    found = (*outputs, *(None,) * (MOST_OUTPUTS - len(outputs)), *grads, *missing)
    return tuple(
        hidden.new_empty(0, dtype=like) if t is None else t
        for t, like in zip(found, (*dtypes, *(hidden.dtype,) * _N_GRADIENTS), strict=True)
    )


@contextlib.contextmanager
def _autograd_within_an_op() -> Iterator[None]:
    """A row loss that is a formula differentiates it; an op runs below autograd, where nothing records."""
    autograd = torch._C.DispatchKey.AutogradFunctionality
    before = torch._C._dispatch_tls_is_dispatch_key_excluded(autograd)
    torch._C._dispatch_tls_set_dispatch_key_excluded(autograd, False)
    try:
        yield
    finally:
        torch._C._dispatch_tls_set_dispatch_key_excluded(autograd, before)


def _options(options: Sequence[Any]) -> tuple[RowLoss, torch.dtype, Any, ChunkOptions]:
    dtype, teacher_dtype, *chunks = options[5:]
    return _decoded(*options[:5]), dtype, teacher_dtype, ChunkOptions(*chunks)


@_op.register_fake
def _fake(hidden: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    tensors = (hidden, *rest[: _N_GRADIENTS - 1])
    target, *_, row_scale, needs = rest[_N_GRADIENTS - 1 : _N_TENSORS]
    loss, dtype, _, _ = _options(rest[_N_TENSORS:])
    likes = loss.output_likes(target, torch.promote_types(dtype, torch.float32))
    outputs = [hidden.new_empty(0 if shape is None else shape, dtype=d) for shape, d in likes]
    outputs += [hidden.new_empty(0)] * (MOST_OUTPUTS - len(likes))
    now = not loss.recomputes or row_scale is not None
    grads = (
        t.new_empty(t.shape) if need and now and t is not None else hidden.new_empty(0)
        for t, need in zip(tensors, needs, strict=True)
    )
    return (*outputs, *grads)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.options = inputs[_N_TENSORS + 1 :]
    ctx.recomputes = _options(ctx.options)[0].recomputes
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(*(inputs[: _N_TENSORS - 1] if ctx.recomputes else output[MOST_OUTPUTS:]))


def _backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    refuse_double_backward()
    found: tuple[Tensor, ...]
    nothing = (None,) * (_N_TENSORS - _N_GRADIENTS + 1 + len(ctx.options))
    if grads[0] is None:
        return (*(None,) * _N_GRADIENTS, *nothing)
    asked = ctx.needs_input_grad[:_N_GRADIENTS]
    if ctx.recomputes:
        found = _op(*ctx.saved_tensors, grads[0], list(asked), *ctx.options)[MOST_OUTPUTS:]
    else:
        found = tuple(grad * grads[0] for grad in ctx.saved_tensors)
    return (*(g if need else None for g, need in zip(found, asked, strict=True)), *nothing)


_op.register_autograd(_backward, setup_context=_setup_context)
