"""DTensor inputs of elementwise ops: compute on the local shards, hand back a DTensor."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def is_dtensor(x: object) -> bool:
    """Whether x is a DTensor, without importing `torch.distributed.tensor` (nobody has one before it is imported)."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(x, module.DTensor)


def on_shards(
    function: Callable[..., Any],
    *tensors: Any,
    whole_dims: tuple[int, ...] = (),
    shapes: Any = None,
) -> Any:
    """`function(*shards)` as DTensors, for a function that is elementwise outside `whole_dims`.

    All tensors are brought to the mesh and the placements of the first DTensor among them, except that a partial sum,
    or a shard of one of `whole_dims`, is made whole first. A plain tensor counts as replicated. Differentiable.
    `shapes`: of the outputs, one for all or a list; default: that of the first tensor. A 0-d output is a sum over
    what each rank has.
    """
    from torch.distributed.tensor import DTensor, Partial, Replicate

    like = next(t for t in tensors if is_dtensor(t))
    mesh = like.device_mesh
    placements = [
        Replicate() if p.is_partial() or any(p.is_shard(d % like.ndim) for d in whole_dims) else p
        for p in like.placements
    ]
    everywhere = [Replicate()] * mesh.ndim
    shards = (
        t
        if t is None
        else (t if is_dtensor(t) else DTensor.from_local(t, mesh, everywhere, run_check=False))
        .redistribute(mesh, placements)
        .to_local()
        for t in tensors
    )
    found = function(*shards)

    def whole(local: Tensor | None, shape: torch.Size) -> Any:
        if local is None:
            return None
        if local.ndim == 0 and like.ndim:
            summed = [Partial() if p.is_shard() else p for p in placements]
            return DTensor.from_local(local, mesh, summed, run_check=False)
        stride = torch.empty(shape, device="meta").stride()
        return DTensor.from_local(
            local, mesh, placements, run_check=False, shape=shape, stride=stride
        )

    shapes = like.shape if shapes is None else shapes
    if not isinstance(found, tuple):
        return whole(found, shapes)
    of_each = shapes if isinstance(shapes, list) else [shapes] * len(found)
    return tuple(map(whole, found, of_each))


def on_row_shards(
    function: Callable[..., Any], *tensors: Tensor | None, n_rows_tensors: int, row_dim: int = -1
) -> Any:
    """`function(*tensors)` of the first `n_rows_tensors`, whose rows it works on, and of parameters of a row.

    A row has the dimensions from `row_dim` on. Each rank computes the rows it holds. The parameters are made whole
    first; their gradients are summed over the ranks that hold different rows.
    """
    from torch.distributed.tensor import DTensor, Partial, Replicate

    like: Any = next(t for t in tensors if is_dtensor(t))
    mesh = like.device_mesh
    everywhere: list[Any] = [Replicate()] * mesh.ndim

    def spread(t: Any) -> Any:
        return t if is_dtensor(t) else DTensor.from_local(t, mesh, everywhere, run_check=False)

    rows = [
        t if any(map(is_dtensor, tensors[:n_rows_tensors])) else spread(t)
        for t in tensors[:n_rows_tensors]
    ]
    x: Any = next(t for t in rows if is_dtensor(t))
    whole_dims = tuple(range(row_dim % x.ndim, x.ndim))
    grads = [
        Partial() if p.is_shard() and not any(map(p.is_shard, whole_dims)) else Replicate()
        for p in x.placements
    ]
    whole = [
        p if p is None else spread(p).redistribute(mesh, everywhere).to_local(grad_placements=grads)
        for p in tensors[n_rows_tensors:]
    ]
    return on_shards(lambda *local: function(*local, *whole), *rows, whole_dims=whole_dims)
