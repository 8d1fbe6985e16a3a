"""Weights of 4 bits in plain PyTorch: the specification."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def dequantize_4bit(
    packed: Tensor,
    code: Tensor,
    absmax: Tensor,
    absmax_code: Tensor | None,
    absmax_scale: Tensor | None,
    absmax_offset: Tensor | None,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    blocksize: int,
    absmax_blocksize: int,
) -> Tensor:
    """code[i] * absmax of its block, rounded once; `absmax` may be quantised itself, to 8 bits and less an offset."""
    n = math.prod(shape)
    if absmax_code is not None and absmax_scale is not None:
        absmax = absmax_code[absmax.long()] * _spread(
            absmax_scale, absmax_blocksize, absmax.numel()
        )
        absmax = absmax if absmax_offset is None else absmax + absmax_offset
    bytes_ = packed.reshape(-1)
    indices = torch.stack((bytes_ >> 4, bytes_ & 15), -1).reshape(-1)[:n]
    return (code[indices.long()] * _spread(absmax, blocksize, n)).view(shape).to(dtype)


def _spread(of_block: Tensor, blocksize: int, n: int) -> Tensor:
    return of_block.reshape(-1).repeat_interleave(blocksize)[:n]
