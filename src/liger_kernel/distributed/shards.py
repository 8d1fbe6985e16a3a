"""Which classes of a vocabulary a rank holds, and what the ranks tell each other of their rows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from liger_kernel._core.autograd import is_transformed
from liger_kernel._core.shapes import cdiv
from liger_kernel.backends import can_look

#: collectives by the name of a group, which torch.compile can put into a graph
_functional = torch.ops._c10d_functional


@dataclass(frozen=True)
class VocabShard:
    """The classes from `first` on are here, of `n_classes` on the `ranks` of the group that is named `group`."""

    first: int
    n_classes: int
    group: str
    ranks: int

    @staticmethod
    def of(n_here: int, group: Any = None, n_classes: int | None = None) -> VocabShard:
        """The shard of this rank, which holds `n_here` classes.

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
                f"rank {rank} of {world} holds {n_here} classes, but {wanted} of n_classes={total}, cut as by "
                f"torch.chunk; pass the number of classes of all ranks."
            )
        return VocabShard(first, total, "" if world == 1 else group.group_name, world)


def statistics_of_all(here: Tensor, n_here: int, shard: VocabShard, smooths_here: bool) -> Tensor:
    """Row statistics (5, N) over all classes from those of this rank, `here` (see the contract of cross entropy).

    One collective, and equal bits on every rank. smooths_here: the sum of the logits stays that of this rank.
    Raises: ValueError on the CPU where the ranks hold other classes than each supposes; elsewhere that gives NaN.
    """
    if shard.ranks == 1:
        return here
    # how many classes each rank has goes along
    packed = torch.cat((here.flatten(), here.new_full((1,), n_here)))
    gathered = _functional.all_gather_into_tensor(packed, shard.ranks, shard.group)
    gathered = _functional.wait_tensor(gathered).view(shard.ranks, -1)
    sizes, parts = gathered[:, -1], gathered[:, :-1].unflatten(1, here.shape)
    differs = (sizes.sum() != shard.n_classes) | (sizes.cumsum(0) - sizes != shard.first).all()
    if not is_transformed() and can_look(differs) and differs:
        raise ValueError(
            f"the ranks hold {sizes.int().tolist()} classes, but this one supposes that its {n_here} are those from "
            f"{shard.first} on, of {shard.n_classes}; pass n_classes, and shards cut as by torch.chunk."
        )
    tops = parts[:, 0]
    top, at = tops.max(0)
    anchor = top.masked_fill(top == -torch.inf, 0)
    total = (parts[:, 1] * (tops - anchor).exp()).sum(0)
    label = parts[:, 2].sum(0).masked_fill(differs, torch.nan)
    smooth = here[3] if smooths_here else parts[:, 3].sum(0)
    return torch.stack((top, total, label, smooth, parts[:, 4].gather(0, at[None])[0]))


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
