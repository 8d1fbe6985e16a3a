"""The chunk loop, the same for every loss and device. It reuses one (chunk, V) slab, and one for a teacher."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from liger_kernel._core.autograd import autocast_dtype_of, without_grad
from liger_kernel._core.rows import RowOutputs, gradient_scale
from liger_kernel.loss_head.groups import RowGroups, rows_to_visit
from liger_kernel.loss_head.plan import ChunkOptions, ChunkPlan, chunk_sizes
from liger_kernel.loss_head.products import (
    GivenRows,
    HeadGradients,
    HeadInputs,
    HeadProducts,
    rows_of,
)
from liger_kernel.loss_head.row_loss import RowLoss
from liger_kernel.loss_head.stripes import Stripes
from liger_kernel.ops.scale_gradients import scale_gradients

#: of hidden states, weight and bias; where there is a low-rank addition to the logits, of its two matrices, too
Gradients = tuple[Tensor | None, ...]


@dataclass
class Kept:
    """What a forward keeps for the backward that will need the logits again: all of them in stripes of classes, where
    that takes no more memory, or those of the last chunk.

    That backward holds a slab anyway, so its peak is the same; with two chunks it saves an eighth of all products.
    """

    needs_dw: bool  # of the backward, whose chunks are those of the forward
    slab: Tensor | None = None
    stripes: Stripes | None = None

    def in_stripes(
        self, loss: RowLoss, head: HeadInputs, plan: ChunkPlan, is_forward: bool
    ) -> Stripes | None:
        if is_forward:
            self.stripes = Stripes.of(loss, head, plan)
        return self.stripes

    def take(self) -> Tensor | None:
        slab, self.slab = self.slab, None
        return slab


@dataclass
class _Steps:
    """The steps of a loss over rows whose logits are there; `target`, `prepared` and `out` are of all rows.

    No product follows on a teacher's logits, so its slab holds fewer rows than a chunk: 4096 rows of two models with
    128k classes would need 0.5 GB more.
    """

    loss: RowLoss
    target: Tensor
    prepared: Any
    kept: Tensor | None  # the rows that these are
    out: RowOutputs
    padded: bool
    teacher: HeadProducts | GivenRows | None = None
    teacher_slab: Tensor | None = None  # empty if that of the teacher is not needed
    rows: int = 0  # of the teacher at a time

    def where(self, at: slice) -> slice | Tensor:
        return at if self.kept is None else self.kept[at]

    def __call__(self, at: slice, logits: Tensor, scale: Tensor | None, makes_grad: bool) -> None:
        """One step for the rows `at`, which have these logits and scales, or several with a teacher."""
        if self.teacher is None or self.teacher_slab is None:
            return self._step(at, logits, None, scale, makes_grad)
        for start in range(at.start, at.stop, self.rows):
            piece = slice(start, min(start + self.rows, at.stop))
            here = slice(piece.start - at.start, piece.stop - at.start)
            slab = self.teacher_slab[: piece.stop - piece.start]
            seen = self.teacher.logits(self.where(piece), slab)
            scales = None if scale is None else scale[here]
            self._step(piece, logits[here], seen, scales, makes_grad)
        return None

    def _step(
        self,
        at: slice,
        logits: Tensor,
        teacher: Tensor | None,
        scale: Tensor | None,
        makes_grad: bool,
    ) -> None:
        prepared = self.loss.of_rows(self.prepared, self.where(at))
        self.loss.step(
            logits,
            teacher,
            rows_of(self.target, at),
            prepared,
            out=self.out[at],
            grad=logits if makes_grad else None,
            row_scale=scale,
            padded=self.padded,
        )


@without_grad
def run(
    loss: RowLoss,
    student: HeadInputs,
    target: Tensor,
    class_weight: Tensor | None,
    options: ChunkOptions,
    needs: Sequence[bool],
    row_scale: Tensor | RowGroups | None = None,
    teacher: HeadInputs | GivenRows | None = None,
    kept_logits: Kept | None = None,
) -> tuple[RowOutputs, tuple[Tensor | None, ...], Gradients]:
    """What `loss` says of each row and of all, and the gradients of sum(loss * row_scale) for which `needs` is true.

    target: (N,). row_scale: in the shape of the loss, or the groups that make it from the losses. The gradients are
    those of the student's tensors, in their dtypes. Rows with an ignored label are left out where one knows how many.
    `kept_logits`: where there are gradients to make, its slab is used up; where not, it gets one.
    """
    hidden, weight, _, dtype, _ = student
    groups = row_scale if isinstance(row_scale, RowGroups) else None
    # `.sum().backward()` hands an expanded scalar to backward
    scale = row_scale.contiguous() if isinstance(row_scale, Tensor) else None
    target = target.to(torch.int64).contiguous()
    prepared = loss.prepare(target, class_weight)
    kept, sizes = rows_to_visit(target, loss.ignore_index, options.label_count, groups)
    if kept is not None:
        target = target[kept]
        scale = None if scale is None else scale[kept]
    n_rows = target.shape[0]
    other = None if teacher is None else teacher.slab_like(weight)
    kept_logits = kept_logits or Kept(needs[1])
    plan = ChunkPlan.of(n_rows, loss.agreed(weight), dtype, options, kept_logits.needs_dw, other)
    stripes = kept_logits.in_stripes(loss, student, plan, is_forward=not any(needs))
    if stripes is not None:
        return _in_stripes(stripes, loss, student, target, prepared, kept, scale, needs)
    chunks = plan.chunks(sizes)
    out = loss.outputs(target, torch.promote_types(dtype, torch.float32))
    sums = HeadGradients(student, needs, plan.sum_dtype(len(chunks)), all_rows=kept is None)

    enlarged = None
    if row_scale is None and any(needs) and sums.takes_large:
        enlarged = gradient_scale(dtype, loss.divisor(prepared), hidden.device)
        scale = None if enlarged is None else enlarged.expand(n_rows).contiguous()
    most = max((at.stop - at.start for at in chunks), default=0)
    head = HeadProducts(student)
    slab = kept_logits.take()
    made = None if slab is None or not chunks else chunks[-1]  # its logits are there already
    slab = head.slab(most) if slab is None else slab
    step = _Steps(loss, target, prepared, kept, out, head.is_padded)
    if teacher is not None:
        step.rows = max(1, min(most, chunk_sizes(weight.device).fewest_rows))
        step.teacher = teacher.products()
        step.teacher_slab = step.teacher.slab(step.rows)

    def chunk(at: slice, rows: Tensor) -> None:
        where = step.where(at)
        logits = rows[:, : weight.shape[0]] if head.is_padded else rows
        x = rows_of(hidden, where).to(dtype)
        if at is not made:
            head.logits(where, rows, x)
        chunk_scale = None if scale is None else scale[at]
        if groups is not None:
            step(at, logits, None, makes_grad=False)
            chunk_scale = groups.row_scale(out.loss[at], where)
        # with a gradient to make, the slab holds that from here on
        step(at, logits, chunk_scale, makes_grad=any(needs))
        if any(needs):
            sums.add(head, rows, x, where)

    with _no_autocast(hidden):
        for at in reversed(chunks) if isinstance(row_scale, Tensor) else chunks:
            chunk(at, rows_of(slab, slice(0, at.stop - at.start)))
    kept_logits.slab = None if any(needs) else slab
    del slab, step.teacher_slab  # their memory serves the rounding of dw
    grads = sums.results()
    if enlarged is not None:
        scale_gradients(grads, 1 / enlarged)
    if kept is not None:
        out = out.spread(kept, hidden.shape[0])
    return out, loss.reduced(out, prepared), grads


def _in_stripes(
    stripes: Stripes,
    loss: RowLoss,
    student: HeadInputs,
    target: Tensor,
    prepared: Any,
    kept: Tensor | None,
    scale: Tensor | None,
    needs: Sequence[bool],
) -> tuple[RowOutputs, tuple[Tensor | None, ...], Gradients]:
    """`run`, forward without a `scale`, else backward. target, scale: of the rows that are `kept`, or of all."""
    hidden, rows = student.hidden, slice(None) if kept is None else kept
    inputs = student._replace(hidden=hidden[rows])
    given = inputs, target, loss.of_rows(prepared, rows)
    out = loss.outputs(target, torch.promote_types(student.dtype, torch.float32))
    grads: Gradients = (None, None, None)
    with _no_autocast(hidden):
        if scale is None:
            stripes.forward(*given, out)
        else:
            dx, *others = stripes.backward(*given, scale, needs)
            if dx is not None and kept is not None:
                dx = torch.zeros_like(hidden).index_copy_(0, kept, dx)
            grads = (dx, *others)
    if kept is not None:
        out = out.spread(kept, hidden.shape[0])
    return out, loss.reduced(out, prepared), grads


def _no_autocast(x: Tensor) -> contextlib.AbstractContextManager[object]:
    narrow = autocast_dtype_of(x.device.type)
    return torch.autocast(x.device.type, enabled=False) if narrow else contextlib.nullcontext()
