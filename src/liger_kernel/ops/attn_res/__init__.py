"""Attention residuals: each token attends to what the blocks before made of it, by a query that is a parameter, instead
of adding all of it up with the same weight."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from liger_kernel._core.autograd import Op
from liger_kernel._core.checks import check_parameters
from liger_kernel._core.lazy import compat_names
from liger_kernel.backends.dispatch import Dispatch, no_shards
from liger_kernel.ops import OPS
from liger_kernel.ops.attn_res import reference
from liger_kernel.ops.attn_res.contract import AttnResOptions


class _AttnRes(Op):
    pass


_dispatch = Dispatch(
    "attn_res",
    _AttnRes,
    reference.attn_res,
    shards=no_shards("attn_res", "call it on the local shards, .to_local()"),
)


def attn_res(
    blocks: Tensor | Sequence[Tensor],
    w_query: Tensor,
    w_norm: Tensor,
    eps: float = 1e-6,
    normed: bool = False,
) -> Tensor:
    """`sum_i alpha_i v_i`, alpha the softmax over the blocks of `w_query . (w_norm * RMSNorm(v_i))`, token by token.

    Args:
        blocks: N tensors (..., D), or one (N, ..., D), any floating dtype; N is any number above 0.
        w_query, w_norm: (D,).
        normed: the sum is that of RMSNorm(v_i), without `w_norm`, as in Inkling-2, and not that of v_i.

    Returns: (..., D) in the dtype of blocks, computed in fp32 and rounded once.
    Raises: ValueError for what does not fit; TypeError for integers and DTensors.
    """
    v = blocks if isinstance(blocks, Tensor) else torch.stack(tuple(blocks))
    if v.ndim < 2 or v.shape[0] == 0:
        raise ValueError(
            f"blocks has shape {tuple(v.shape)}; pass at least one block, as (N, ..., D)."
        )
    check_parameters(v, w_query=w_query, w_norm=w_norm)
    found: Tensor = _dispatch(AttnResOptions(float(eps), bool(normed)), v, w_query, w_norm)
    return found


__getattr__ = compat_names(__name__, OPS["attn_res"])
