"""A mixture of experts that are spread over ranks, each with tokens of its own.

Every rank gathers the tokens of all, runs its own experts on those that chose them, and the parts of a token's sum are
added where the token came from. A token has K experts, and so meets most ranks anyway; to send it only there, the host
would have to wait for the device to say how many go where.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from liger_kernel._core.autograd import refuse_double_backward
from liger_kernel.backends import can_look
from liger_kernel.ops.fused_moe import fused_moe
from liger_kernel.ops.fused_moe.checks import check_index


def expert_parallel_moe(
    x: Tensor,
    gate_weight: Tensor,
    up_weight: Tensor,
    down_weight: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
    num_experts: int,
    group: Any = None,
) -> Tensor:
    """`fused_moe` with SwiGLU, whose experts are spread over the ranks of `group`, all of them if None.

    Args:
        x: (T, H), tokens of this rank; every rank has as many. top_k_index, top_k_weights: (T, K), of all experts.
        gate_weight, up_weight: (E, I, H), down_weight: (E, H, I): of this rank's experts, which are those from rank * E
            on, or of all of them, of which this rank then uses its own, and gives the others a gradient of zero.
    Returns: (T, H). Gradients of weights are sums over the tokens of all ranks.
    Raises: ValueError for experts that cannot be spread, an index out of range, and other numbers of tokens on other
        ranks, the last two on the CPU only, where looking costs no synchronisation.
    """
    is_alone = group is None and not (dist.is_available() and dist.is_initialized())
    ranks, rank = (1, 0) if is_alone else (dist.get_world_size(group), dist.get_rank(group))
    n_here = num_experts // ranks
    if n_here * ranks != num_experts or gate_weight.shape[0] not in (n_here, num_experts):
        raise ValueError(
            f"this rank has the weights of {gate_weight.shape[0]} experts, of num_experts={num_experts} on {ranks} "
            f"ranks; pass those of num_experts / ranks, as many on every rank, or those of all."
        )
    check_index(top_k_index, num_experts)
    if gate_weight.shape[0] > n_here:
        own = slice(rank * n_here, (rank + 1) * n_here)
        gate_weight, up_weight, down_weight = gate_weight[own], up_weight[own], down_weight[own]
    if ranks == 1:
        return fused_moe(
            x, torch.cat((gate_weight, up_weight), 1), down_weight, top_k_index, top_k_weights
        )
    _check_tokens(x, ranks, group)
    works: list[Any] = []  # while these are under way, the weights are put side by side
    x, index, weights = (
        _Gather.apply(t, ranks, group, works) for t in (x, top_k_index, top_k_weights)
    )
    gate_up_weight = torch.cat((gate_weight, up_weight), 1)
    for work in works:
        work.wait()
    index = index - rank * n_here
    index = index.masked_fill((index < 0) | (index >= n_here), n_here)  # nobody's here
    found: Tensor = _Scatter.apply(
        fused_moe(x, gate_up_weight, down_weight, index, weights), ranks, group
    )
    return found


def _check_tokens(x: Tensor, ranks: int, group: Any) -> None:
    if not can_look(x):
        return
    counts = torch.empty(ranks, dtype=torch.int64)
    dist.all_gather_into_tensor(counts, torch.tensor([x.shape[0]]), group=group)
    if counts.min() != counts.max():
        raise ValueError(
            f"the ranks have {counts.tolist()} tokens; pad them to the same number, with the expert num_experts."
        )


def _gathered(x: Tensor, ranks: int, group: Any) -> tuple[Tensor, Any]:
    """The rows of all ranks, once the work is done."""
    out = x.new_empty(ranks * x.shape[0], *x.shape[1:])
    return out, dist.all_gather_into_tensor(out, x.contiguous(), group=group, async_op=True)


def _scattered(x: Tensor, ranks: int, group: Any) -> Tensor:
    """The sum over the ranks of the rows of this one."""
    x = x.contiguous()
    if can_look(x):  # gloo only learnt it in torch 2.8
        x = x.clone()
        dist.all_reduce(x, group=group)
        return x.chunk(ranks)[dist.get_rank(group)]
    out = x.new_empty(x.shape[0] // ranks, *x.shape[1:])
    dist.reduce_scatter_tensor(out, x, group=group)
    return out


class _Gather(torch.autograd.Function):
    """The rows of all ranks, once what it adds to `works` is done."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, ranks: int, group: Any, works: list[Any]) -> Tensor:
        ctx.of_forward = ranks, group
        out, work = _gathered(x, ranks, group)
        works.append(work)
        if not x.is_floating_point():
            ctx.mark_non_differentiable(out)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        refuse_double_backward()
        return _scattered(grads[0], *ctx.of_forward), None, None, None


class _Scatter(torch.autograd.Function):
    """The sum over the ranks of the rows of this one."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, ranks: int, group: Any) -> Tensor:
        ctx.of_forward = ranks, group
        return _scattered(x, ranks, group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        refuse_double_backward()
        out, work = _gathered(grads[0], *ctx.of_forward)
        work.wait()
        return out, None, None
