"""Neighbourhood attention (Hassani et al. 2022, https://arxiv.org/abs/2204.07143) along one dimension: a query sees the
keys around it. Time and memory are proportional to the window, not to the length of the sequence."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from liger_kernel._core.autograd import autocast_dtype
from liger_kernel._core.checks import check_floating, check_same_device
from liger_kernel._core.lazy import compat_names
from liger_kernel._core.shapes import cdiv, next_power_of_2
from liger_kernel.ops import OPS
from liger_kernel.ops.softmax import softmax

#: queries of a block at least, and what its keys are a multiple of, for products to be fast
_BLOCK, _MULTIPLE = 32, 8


def fused_neighborhood_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kernel_size: int = 7,
    dilation: int = 1,
    scale: float | None = None,
) -> Tensor:
    """Softmax attention of each query to the `kernel_size` keys around it, every `dilation`-th.

    Args:
        query, key: (..., S, D); value: (..., S, Dv), one floating dtype, any strides.
        kernel_size: query i sees key j if |i - j| <= (kernel_size // 2) dilation, and dilation divides i - j. At the
            ends of the sequence there are fewer.
        scale: of the scores; None for 1 / sqrt(D).

    Returns: (..., S, Dv). Products and probabilities are rounded to the dtype of query.
    A block of queries is multiplied by the keys that any of them sees: twice as many as each sees for large windows.
    Raises: ValueError for shapes that do not fit, or a window or dilation below 1; TypeError for integers or other
        dtypes.
    """
    _check(query, key, value, kernel_size, dilation)
    length, scale = query.shape[-2], query.shape[-1] ** -0.5 if scale is None else scale
    n_own = cdiv(
        length, dilation
    )  # positions that see each other at all: a class of them for each remainder
    reach = max(0, min(kernel_size // 2, n_own - 1))
    block = max(_BLOCK, next_power_of_2(2 * reach))
    n_blocks = max(1, cdiv(n_own, block))
    width = cdiv(block + 2 * reach, _MULTIPLE) * _MULTIPLE
    after = n_blocks * block - n_own

    def windows(t: Tensor) -> Tensor:
        """(..., dilation, n_blocks, D, width)"""
        padded = F.pad(_by_class(t, dilation), (0, 0, reach, after + width - block - reach))
        return padded.unfold(-2, width, block)

    queries = F.pad(_by_class(query * scale, dilation), (0, 0, 0, after))
    scores = queries.unflatten(-2, (n_blocks, block)) @ windows(key)
    visible = _visible(length, dilation, reach, (n_blocks, block, width), query.device)
    weights = softmax(scores.masked_fill(~visible, float("-inf")))
    found = weights @ windows(value).transpose(-1, -2)
    own = found.flatten(-3, -2)[..., :n_own, :]
    return own.transpose(-2, -3).flatten(-3, -2)[..., :length, :]


def _by_class(t: Tensor, dilation: int) -> Tensor:
    """(..., S, D) as (..., dilation, ceil(S / dilation), D): by the remainder of the position."""
    if dilation == 1:
        return t.unsqueeze(-3)
    n_own = cdiv(t.shape[-2], dilation)
    padded = F.pad(t, (0, 0, 0, n_own * dilation - t.shape[-2]))
    return padded.unflatten(-2, (n_own, dilation)).transpose(-2, -3)


def _visible(
    length: int, dilation: int, reach: int, sizes: tuple[int, int, int], device: torch.device
) -> Tensor:
    """Which keys of its block a query sees: (dilation, n_blocks, block, width), or 1 for dilation.

    A query of the padding sees keys of the padding, so that its probabilities are numbers, which nobody reads.
    """
    n_blocks, block, width = sizes
    starts = torch.arange(n_blocks, device=device)[:, None, None] * block
    rows = starts + torch.arange(block, device=device)[:, None]
    columns = starts + torch.arange(width, device=device) - reach
    remainder = torch.arange(dilation, device=device)[:, None, None, None]
    key_is_there = (columns >= 0) & (columns * dilation + remainder < length)
    query_is_not = rows * dilation + remainder >= length
    return ((rows - columns).abs() <= reach) & (key_is_there | query_is_not)


def _check(query: Tensor, key: Tensor, value: Tensor, kernel_size: int, dilation: int) -> None:
    named = {"query": query, "key": key, "value": value}
    check_floating(**named)
    check_same_device(**named)
    if query.ndim < 2 or key.shape != query.shape or value.shape[:-1] != query.shape[:-1]:
        shapes = ", ".join(f"{name} {tuple(t.shape)}" for name, t in named.items())
        raise ValueError(f"{shapes} do not fit: pass (..., S, D) twice, and (..., S, Dv).")
    if len({t.dtype for t in named.values()}) > 1 and autocast_dtype(query) is None:
        dtypes = ", ".join(f"{name} is {t.dtype}" for name, t in named.items())
        raise TypeError(f"{dtypes}; convert them with .to(), or use torch.autocast.")
    if kernel_size < 1 or dilation < 1:
        raise ValueError(f"kernel_size={kernel_size} and dilation={dilation} must be at least 1.")


__getattr__ = compat_names(__name__, OPS["fused_neighborhood_attention"])
