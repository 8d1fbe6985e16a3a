"""Which classes of a vocabulary a rank holds, what ranks tell each other of their rows, and what losses make of it."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor

from liger_kernel._core.autograd import in_torch_func, is_transformed, refuse_double_backward
from liger_kernel._core.checks import check_same_device
from liger_kernel._core.rows import RowOutputs
from liger_kernel._core.shapes import as_rows, cdiv
from liger_kernel.backends import can_look
from liger_kernel.loss_head.row_loss import RowLoss
from liger_kernel.ops.cross_entropy import (
    check_class_indices,
    check_labels,
    only_loss_has_gradient,
)
from liger_kernel.ops.cross_entropy.portable import of_all_classes

#: collectives by the name of a group, which torch.compile can put into a graph
_functional = torch.ops._c10d_functional


def shard_of(n_here: int, group: Any = None, n_classes: int | None = None) -> dict[str, Any]:
    """The fields of `ShardedLoss` for this rank, which holds `n_here` classes.

    group: a process group; None, and a group of one rank, for all classes. n_classes: of all ranks, cut as by
    `torch.chunk` and DTensor, so that the last ranks may have fewer or none; None where each rank has `n_here`.
    Raises: ValueError where this rank should hold another number of classes.
    """
    world = 1 if group is None else group.size()
    rank = 0 if world == 1 else dist.get_rank(group)
    total = n_here * world if n_classes is None else n_classes
    largest = cdiv(total, world)
    first = min(rank * largest, total)
    wanted = min(largest, total - first)
    if wanted != n_here:
        raise ValueError(
            f"rank {rank} of {world} holds {n_here} classes, but {wanted} of n_classes={total}, cut as by torch.chunk; "
            f"pass the number of classes of all ranks."
        )
    name = "" if world == 1 else group.group_name
    return {"first": first, "n_classes": total, "group": name, "ranks": world}


@dataclass(frozen=True)
class ShardedLoss(RowLoss):
    """A row loss of the classes from `first` on, of `n_classes` on the `ranks` of the group that is named `group`.

    whole: the same loss on one rank. n_classes: 0 for those of the logits, as on one rank.
    """

    whole: ClassVar[type[RowLoss]]

    first: int = 0
    n_classes: int = 0
    group: str = ""
    ranks: int = 1

    @abstractmethod
    def said(
        self, logits: Tensor, target: Tensor, prepared: Any, out: RowOutputs, padded: bool
    ) -> Tensor:
        """What all ranks say of these rows, as `gradient` reads it; `out` is filled. One collective."""

    @abstractmethod
    def gradient(
        self,
        logits: Tensor,
        target: Tensor,
        prepared: Any,
        said: Tensor,
        *,
        grad: Tensor,
        row_scale: Tensor | None,
        padded: bool,
    ) -> None:
        """The half of `step` that makes the gradient, of what all ranks `said`.

        prepared: as in `step`; or, where nothing of all labels is left to be read, the class weights.
        """

    def whole_vocabulary(self, n_here: int) -> int:
        return self.n_classes or n_here

    def agreed(self, weight: Tensor) -> Tensor:
        largest = cdiv(self.whole_vocabulary(weight.shape[0]), self.ranks)
        return weight.new_empty(1, 1).expand(largest, weight.shape[1])

    def of_logits(
        self, logits: Tensor, teacher: Tensor | None, target: Tensor, class_weight: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        if self.ranks > 1:
            return RowLoss.of_logits(self, logits, teacher, target, class_weight)
        options = {name: getattr(self, name) for name in self.whole.__match_args__}
        return self.whole(**options).of_logits(logits, teacher, target, class_weight)

    def step(
        self,
        logits: Tensor,
        teacher: Tensor | None,
        target: Tensor,
        prepared: Any,
        *,
        out: RowOutputs,
        grad: Tensor | None = None,
        row_scale: Tensor | None = None,
        padded: bool = False,
    ) -> None:
        said = self.said(logits, target, prepared, out, padded)
        if grad is not None:
            how: dict[str, Any] = {"grad": grad, "row_scale": row_scale, "padded": padded}
            self.gradient(logits, target, prepared, said, **how)

    def of_all(
        self,
        kernels: Any,
        logits: Tensor,
        *given: Any,
        rows: int,
        padded: bool,
        sums_here: bool = False,
    ) -> Tensor:
        """`rows` statistics of each row over the classes of all ranks, by `kernels.statistics(logits, *given)`.

        sums_here: the sum of the logits stays that of this rank.
        """
        n_here = logits.shape[1]
        wide = torch.promote_types(logits.dtype, torch.float32)
        here = torch.empty((rows, logits.shape[0]), dtype=wide, device=logits.device)
        if n_here:
            how = {"first": self.first, "options": self, "out": here, "padded": padded}
            kernels.statistics(logits, *given, **how)
        else:
            here.zero_()[0] = -torch.inf
        if self.ranks == 1:
            return here
        found = _across(here, n_here, self)
        if sums_here:
            found[3] = here[3]
        return found


def _across(here: Tensor, n_here: int, loss: ShardedLoss) -> Tensor:
    """The statistics of all ranks from those of each, `here`: equal bits on every rank.

    Their rows: the largest logit, the sum of e = exp(x - that), the logit of the label, the sum of the logits, the
    class of the largest; and perhaps the sums of e (x - largest) and of e^2.
    Raises: ValueError on the CPU where the ranks hold other classes than each supposes; elsewhere that gives NaN.
    """
    # how many classes each rank has goes along
    packed = torch.cat((here.flatten(), here.new_full((1,), n_here)))
    gathered = _functional.all_gather_into_tensor(packed, loss.ranks, loss.group)
    gathered = _functional.wait_tensor(gathered).view(loss.ranks, -1)
    sizes, parts = gathered[:, -1], gathered[:, :-1].unflatten(1, here.shape)
    differs = (sizes.sum() != loss.n_classes) | (sizes.cumsum(0) - sizes != loss.first).all()
    if not is_transformed() and can_look(differs) and differs:
        raise ValueError(
            f"the ranks hold {sizes.int().tolist()} classes, but this one supposes that its {n_here} are those from "
            f"{loss.first} on, of {loss.n_classes}; pass n_classes, and shards cut as by torch.chunk."
        )
    found = of_all_classes(parts)
    found[2].masked_fill_(differs, torch.nan)
    return found


def on_logits(
    loss: ShardedLoss, logits: Tensor, target: Tensor, class_weight: Tensor | None = None
) -> Any:
    """What `loss.reduced` says of logits (N, classes of this rank), which are kept for backward and not changed."""
    if logits.ndim != 2 or target.shape != logits.shape[:1]:
        raise ValueError(
            f"logits have shape {tuple(logits.shape)} and target {tuple(target.shape)}, not (N, V) and (N,); "
            f"flatten them with .view(-1, logits.shape[-1]) and .view(-1)."
        )
    check_class_indices(target)
    check_same_device(logits=logits, target=target, class_weight=class_weight)
    target = target.to(torch.int64).contiguous()
    if in_torch_func() or (is_transformed() and not torch.compiler.is_compiling()):
        wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return loss.of_logits(wide, None, target, class_weight)
    if not is_transformed():
        check_labels(target, loss.whole_vocabulary(logits.shape[1]), loss.ignore_index)
    if not torch.is_grad_enabled():
        logits = logits.detach()
    return _OnLogits.apply(logits, target, class_weight, loss)


class _OnLogits(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, target: Tensor, class_weight: Tensor | None, loss: ShardedLoss
    ) -> Any:
        rows, prepared = as_rows(logits), loss.prepare(target, class_weight)
        out = loss.outputs(target, torch.promote_types(rows.dtype, torch.float32))
        said = loss.said(rows, target, prepared, out, False)
        outputs = loss.reduced(out, prepared)
        only_loss_has_gradient(ctx, outputs)
        ctx.save_for_backward(rows, target, class_weight, said)
        ctx.loss = loss
        return outputs

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        if not torch.compiler.is_compiling():  # which traces this
            refuse_double_backward()
        if grads[0] is None:
            return (None,) * 4
        *given, said = ctx.saved_tensors
        grad = torch.empty(given[0].shape, dtype=given[0].dtype, device=given[0].device)
        ctx.loss.gradient(*given, said, grad=grad, row_scale=grads[0], padded=False)
        return grad, None, None, None


def sum_of_gradients(x: Tensor, group: str) -> Tensor:
    """x, the same on all ranks, each of which makes a part of its gradient: that is summed in backward."""
    found: Tensor = _SumOfGradients.apply(x, group) if group else x
    return found


class _SumOfGradients(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: str) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        total = _functional.all_reduce(grads[0].contiguous(), "sum", ctx.group)
        return _functional.wait_tensor(total), None
