"""GroupNorm over the channels of a group (Wu & He 2018, https://arxiv.org/abs/1803.08494)."""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from liger_kernel._core.autograd import Op
from liger_kernel._core.checks import check_floating, check_same_device
from liger_kernel._core.dtensor import on_row_shards
from liger_kernel._core.lazy import compat_names
from liger_kernel.backends.dispatch import Dispatch
from liger_kernel.ops import OPS
from liger_kernel.ops.group_norm import reference
from liger_kernel.ops.group_norm.contract import GroupNormOptions


class _GroupNorm(Op):
    pass


def _native(
    options: GroupNormOptions, x: Tensor, weight: Tensor | None, bias: Tensor | None
) -> Tensor | None:
    """`F.group_norm` in fp32; its backward fails without a weight."""
    if weight is None:
        return None
    wide = torch.promote_types(x.dtype, torch.float32)
    w, b = weight.to(wide), None if bias is None else bias.to(wide)
    return F.group_norm(x.to(wide), options.num_groups, w, b, options.eps).to(x.dtype)


_dispatch = Dispatch(
    "group_norm",
    _GroupNorm,
    reference.group_norm,
    shards=functools.partial(on_row_shards, n_rows_tensors=1, row_dim=1),
    native=_native,
)


def group_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    num_groups: int,
    eps: float = 1e-5,
) -> Tensor:
    """GroupNorm: `(x - mean) / sqrt(mean((x - mean)^2) + eps) * weight + bias`, the means over the channels of a group.

    Args:
        x: (B, C, ...), any floating dtype; copied unless contiguous. A DTensor is normalised shard by shard, whole
            entries of the batch at a time.
        weight, bias: (C,) each, or None.
        num_groups: of C / num_groups neighbouring channels each.
        eps: added to the variance.

    Returns: (B, C, ...) in the dtype of x, computed in fp32 and rounded once, whatever the dtypes of weight and bias.
    Raises: ValueError for channels that do not part into the groups, a weight or bias that does not fit; TypeError for
        integer tensors.
    """
    check_groups(x, weight, bias, num_groups)
    return _dispatch(GroupNormOptions(num_groups, eps), x, weight, bias)


def check_groups(x: Tensor, weight: Tensor | None, bias: Tensor | None, num_groups: int) -> None:
    check_floating(x=x, weight=weight, bias=bias)
    check_same_device(x=x, weight=weight, bias=bias)
    if x.ndim < 2:
        raise ValueError(f"x has shape {tuple(x.shape)}; pass a tensor of shape (B, C, ...).")
    channels = x.shape[1]
    if num_groups < 1 or channels % num_groups:
        raise ValueError(
            f"num_groups={num_groups} does not divide the {channels} channels of x {tuple(x.shape)}; pass a divisor."
        )
    for name, p in (("weight", weight), ("bias", bias)):
        if p is not None and p.shape != (channels,):
            raise ValueError(
                f"{name} has shape {tuple(p.shape)}, but x has {channels} channels; pass one of shape ({channels},)."
            )


def check_channels(x: Tensor, num_channels: int) -> None:
    if x.ndim < 2 or x.shape[1] != num_channels:
        raise ValueError(
            f"x has shape {tuple(x.shape)}, but num_channels={num_channels}; pass x of shape (B, {num_channels}, ...)."
        )


__getattr__ = compat_names(__name__, OPS["group_norm"])
