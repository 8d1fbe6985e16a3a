"""The way into the loss head, and its one autograd node."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from liger_kernel._core.autograd import (
    autocast_dtype,
    graph_task,
    in_torch_func,
    is_checkpointed,
    is_transformed,
    made_in_forward,
    refuse_double_backward,
)
from liger_kernel._core.checks import check_floating, check_last_dim, check_same_device
from liger_kernel._core.dtensor import is_dtensor
from liger_kernel.loss_head import library, loop
from liger_kernel.loss_head.groups import RowGroups
from liger_kernel.loss_head.label_count import check_label_count
from liger_kernel.loss_head.losses import ROW_LOSSES
from liger_kernel.loss_head.plan import ChunkOptions
from liger_kernel.loss_head.products import GivenRows, HeadInputs, LowRank
from liger_kernel.loss_head.row_loss import RowLoss
from liger_kernel.ops.cross_entropy import (
    check_class_indices,
    check_labels,
    only_loss_has_gradient,
)
from liger_kernel.ops.scale_gradients import scale_gradients

_PLAIN = (Tensor, torch.nn.Parameter)


def linear_loss(
    loss: RowLoss,
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None = None,
    *,
    class_weight: Tensor | None = None,
    teacher: tuple[Tensor, Tensor | None, Tensor | None] | None = None,
    low_rank: tuple[Tensor, Tensor] | None = None,
    chunks: ChunkOptions = ChunkOptions(),  # noqa: B008 - frozen
    groups: RowGroups | None = None,
    helpers: tuple[Callable[..., Any], Callable[..., Any]] | None = None,
) -> tuple[Any, ...]:
    """`loss` of `hidden @ weight.T + bias`, one chunk of logits at a time.

    Args:
        hidden: (N, H). weight: (V, H) in the same dtype. target: (N,) integer labels. bias: (V,).
        class_weight: (V,), where the loss has class weights; (N,) for one that `weighs_rows`.
        teacher: hidden states (N, Ht), weight (Vt, Ht) and bias of a second model, constants; or, where the weight is
            None, what that model said of each row (N, Vt) itself; or (N, K) of some classes, whose ids (N, K) stand in
            place of the bias. The others have probability 0 then.
        low_rank: (N, r) and (V, r), whose product is added to the logits, as LoRA on the head does.
        groups: the loss of all rows by groups; what is returned is then (loss, *reported) of `groups.loss_of`.
        helpers: the functions that eager calls go through, where frameworks wrap them by name: see
            `fused_linear_cross_entropy_forward` and `..._backward`.

    Returns: what `loss.reduced` says; the first is the loss. Under autocast the matrix products run in its dtype; the
    gradients have the dtypes of their parameters. With reductions "mean" and "sum", and with groups, gradients are made
    in forward, only for tensors that require one, and handed out by backward; with "none" backward runs the loop again.
    Under the transforms of torch.func, forward-mode AD and torch.jit.trace all logits are made, by PyTorch's own ops.
    Raises: ValueError and TypeError for tensors that do not fit.
    """
    check_tensors(hidden, weight, target, bias, class_weight, weighs_rows=loss.weighs_rows)
    check_label_count(chunks.label_count, target.numel(), loss.ignore_index)
    low = None if low_rank is None else _checked(hidden, weight, LowRank(*low_rank))
    student = HeadInputs(hidden, weight, bias, compute_dtype(hidden, weight), low)
    other: HeadInputs | GivenRows | None = None
    if teacher is not None:
        t_hidden, t_weight, t_bias = teacher
        if t_weight is None:
            other = GivenRows.of(t_hidden, t_bias, target, weight.shape[0], loss.ignore_index)
        else:
            check_tensors(t_hidden, t_weight, target, t_bias, name="teacher_")
            t_bias = None if t_bias is None else t_bias.detach()
            t_dtype = compute_dtype(t_hidden, t_weight)
            other = HeadInputs(t_hidden.detach(), t_weight.detach(), t_bias, t_dtype)
    if loss.reads_teacher != (teacher is not None):
        raise ValueError(
            f"{type(loss).__name__} {'needs a' if loss.reads_teacher else 'has no'} teacher, got {teacher!r:.40}."
        )
    compiling = torch.compiler.is_compiling()
    if in_torch_func() or (is_transformed() and not compiling):
        return _by_all_logits(loss, student, target, class_weight, other)
    if compiling and groups is None:
        if type(loss).name in ROW_LOSSES:
            return library.call(loss, student, target, class_weight, chunks, other)
        return _outside_the_graph(loss, student, target, class_weight, chunks, other)
    return _run(loss, student, target, class_weight, chunks, other, groups, helpers)


def _run(
    loss: RowLoss,
    student: HeadInputs,
    target: Tensor,
    class_weight: Tensor | None,
    chunks: ChunkOptions,
    teacher: HeadInputs | GivenRows | None,
    groups: RowGroups | None = None,
    helpers: Any = None,
) -> tuple[Any, ...]:
    check_labels(target, loss.whole_vocabulary(student.weight.shape[0]), loss.ignore_index)
    *tensors, dtype, low = student
    tensors += low or ()
    if not torch.is_grad_enabled():  # `needs_input_grad` does not know about no_grad
        tensors = [None if t is None else t.detach() for t in tensors]
    rest = (dtype, target, class_weight, teacher, loss, chunks, groups, helpers)
    found: tuple[Any, ...] = _LinearLoss.apply(rest, *tensors)
    return found


def _by_all_logits(
    loss: RowLoss,
    student: HeadInputs,
    target: Tensor,
    class_weight: Tensor | None,
    teacher: HeadInputs | GivenRows | None,
) -> tuple[Any, ...]:
    def logits(head: HeadInputs | GivenRows) -> Tensor:
        if isinstance(head, GivenRows):
            return head.logits(slice(None), head.slab(target.shape[0]))
        hidden, weight, bias, dtype, low = head
        bias = None if bias is None else bias.to(dtype)
        found = F.linear(hidden.to(dtype), weight.to(dtype), bias)
        if low is not None:
            found = found + F.linear(low.rows.to(dtype), low.columns.to(dtype))
        return found.to(torch.promote_types(dtype, torch.float32))

    of_teacher = None if teacher is None else logits(teacher)
    return loss.of_logits(logits(student), of_teacher, target.to(torch.int64), class_weight)


@torch.compiler.disable
def _outside_the_graph(*arguments: Any) -> tuple[Any, ...]:
    return _run(*arguments)


def _head(dtype: torch.dtype, hidden: Tensor, weight: Tensor, *others: Any) -> HeadInputs:
    bias, *low = others
    return HeadInputs(hidden, weight, bias, dtype, LowRank(*low) if low else None)


class _LinearLoss(torch.autograd.Function):
    """Of what is no tensor of the head, then hidden, weight, bias and, if there is one, the low-rank pair."""

    @staticmethod
    def forward(ctx: Any, rest: Any, *tensors: Any) -> Any:
        dtype, target, class_weight, teacher, loss, chunks, groups, helpers = rest
        hidden, weight, bias, *_ = tensors
        needs = ctx.needs_input_grad[1:]
        ctx.recomputes = groups is None and loss.recomputes
        now = (False,) * len(needs) if ctx.recomputes else needs
        # a checkpoint that drops what is saved here is there to keep nothing until backward
        keeps = ctx.recomputes and any(needs) and (graph_task() != -1 or not is_checkpointed())
        ctx.kept_logits = loop.Kept(needs[1]) if keeps else None
        if helpers is not None:
            settings = (loss, chunks, dtype)
            *outputs, dx, dw, db = helpers[0](
                hidden, weight, target, class_weight, bias, settings=settings, needs=now
            )
            grads: tuple[Tensor | None, ...] = (dx, dw, db)
        else:
            head = _head(dtype, *tensors)
            out, outputs, grads = loop.run(
                loss, head, target, class_weight, chunks, now, groups, teacher, ctx.kept_logits
            )
        if groups is not None:
            outputs = groups.loss_and_reported(out.loss)
        only_loss_has_gradient(ctx, outputs)
        if any(needs):
            # what makes no gradient any more is let go, such as the logits of a teacher
            ctx.rest = rest if ctx.recomputes else (*(None,) * 7, helpers)
            ctx.save_for_backward(*(tensors if ctx.recomputes else grads))
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        refuse_double_backward()
        if grads[0] is None:
            return (None,) * len(ctx.needs_input_grad)
        dtype, target, class_weight, teacher, loss, chunks, _, helpers = ctx.rest
        if not ctx.recomputes:
            found = made_in_forward(ctx)
            if helpers is not None:
                return None, *helpers[1](grads[0], *found)
            scale_gradients(found, grads[0])
            return None, *found
        needs = ctx.needs_input_grad[1:]
        if helpers is not None:
            hidden, weight, bias = ctx.saved_tensors
            found = helpers[
                0
            ](
                hidden,
                weight,
                target,
                class_weight,
                bias,
                settings=(loss, chunks, dtype),  # of the forward: autocast is off by now
                needs=needs,
                token_grad_output=grads[0],
            )[-3:]
            return None, *found
        head = _head(dtype, *ctx.saved_tensors)
        found = loop.run(
            loss, head, target, class_weight, chunks, needs, grads[0], teacher, ctx.kept_logits
        )[2]
        return None, *found


def compute_dtype(hidden: Tensor, weight: Tensor) -> torch.dtype:
    """Of the logits and the matrix products: the one of autocast, else that of hidden and weight."""
    autocast = autocast_dtype(hidden)
    if autocast is not None:
        return autocast
    if hidden.dtype != weight.dtype:
        raise TypeError(
            f"hidden is {hidden.dtype}, but weight is {weight.dtype}; convert one with .to(), or use torch.autocast."
        )
    return hidden.dtype


def _checked(hidden: Tensor, weight: Tensor, low: LowRank) -> LowRank:
    rows, columns = low
    check_floating(low_rank_rows=rows, low_rank_columns=columns)
    check_same_device(hidden=hidden, low_rank_rows=rows, low_rank_columns=columns)
    wanted = (hidden.shape[:1], weight.shape[:1])
    if rows.ndim != 2 or columns.ndim != 2 or (rows.shape[:1], columns.shape[:1]) != wanted:
        raise ValueError(
            f"low_rank has shapes {tuple(rows.shape)} and {tuple(columns.shape)} for {hidden.shape[0]} rows and "
            f"{weight.shape[0]} classes; pass ({hidden.shape[0]}, r) and ({weight.shape[0]}, r)."
        )
    if rows.shape[1] != columns.shape[1]:
        raise ValueError(
            f"low_rank has ranks {rows.shape[1]} and {columns.shape[1]}; pass (N, r) and (V, r)."
        )
    return low


def check_tensors(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    class_weight: Tensor | None = None,
    name: str = "",
    weighs_rows: bool = False,
) -> None:
    if (  # one pass where all is well
        bias is class_weight is None
        and type(hidden) in _PLAIN
        and type(weight) in _PLAIN
        and hidden.ndim == weight.ndim == 2
        and target.shape == hidden.shape[:1]
        and weight.shape[1] == hidden.shape[1]
        and hidden.is_floating_point()
        and weight.is_floating_point()
        and target.dtype == torch.int64
        and hidden.device == weight.device == target.device
    ):
        return
    named = {
        f"{name}hidden": hidden,
        f"{name}weight": weight,
        f"{name}bias": bias,
        "class_weight": class_weight,
    }
    for key, tensor in named.items():
        if is_dtensor(tensor):
            raise TypeError(
                f"{key} is a DTensor, which the loss head does not take; pass {key}.full_tensor()."
            )
    check_floating(**named)
    if hidden.ndim != 2 or target.shape != hidden.shape[:1]:
        raise ValueError(
            f"{name}hidden has shape {tuple(hidden.shape)} and target {tuple(target.shape)}, not (N, H) and (N,); "
            f"flatten them with .view(-1, H) and .view(-1)."
        )
    if weight.ndim != 2 or weight.shape[1] != hidden.shape[1]:
        raise ValueError(
            f"{name}weight has shape {tuple(weight.shape)}, but hidden states are {hidden.shape[1]} wide; "
            f"pass a weight of shape (V, {hidden.shape[1]})."
        )
    check_last_dim(f"{name}bias", bias, weight.shape[0], "the logits")
    if weighs_rows:
        check_last_dim("class_weight", class_weight, target.shape[0], "the target")
    else:
        check_last_dim("class_weight", class_weight, weight.shape[0], "the logits")
    check_class_indices(target)
    check_same_device(target=target, **named)
