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
    function: Callable[..., Tensor],
    *tensors: Any,
    shape: torch.Size,
    whole_dims: tuple[int, ...] = (),
) -> Any:
    """`function(*shards)` as a DTensor of the global `shape`, for a function that is elementwise outside `whole_dims`.

    All tensors are brought to the mesh and the placements of the first DTensor among them, except that a partial sum,
    or a shard of one of `whole_dims`, is made whole first. A plain tensor counts as replicated. Differentiable.
    """
    from torch.distributed.tensor import DTensor, Replicate

    like = next(t for t in tensors if is_dtensor(t))
    mesh = like.device_mesh
    placements = [
        Replicate() if p.is_partial() or any(p.is_shard(d % len(shape)) for d in whole_dims) else p
        for p in like.placements
    ]
    everywhere = [Replicate()] * mesh.ndim
    shards = (
        (t if is_dtensor(t) else DTensor.from_local(t, mesh, everywhere, run_check=False))
        .redistribute(mesh, placements)
        .to_local()
        for t in tensors
    )
    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(
        function(*shards), mesh, placements, run_check=False, shape=shape, stride=stride
    )
