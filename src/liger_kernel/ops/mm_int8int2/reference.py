"""The product of int8 with packed 2-bit integers in plain PyTorch: the specification, and the packing."""

from __future__ import annotations

import torch
from torch import Tensor

_EXACT = 2**24 // 2**8  # terms of a sum of products of int8 and 2 bits that float32 holds exactly


def unpacked(packed: Tensor) -> Tensor:
    """(4 R, N) int8 of (R, N) uint8: the two lowest bits are 1 more than the first R rows."""
    return torch.cat([(packed >> 2 * i & 3).to(torch.int8) - 1 for i in range(4)])


def mm_int8int2(a: Tensor, b: Tensor) -> Tensor:
    """a @ unpacked(b), in int32: no device has to multiply integers for it."""
    dtype = torch.float32 if a.shape[1] <= _EXACT else torch.float64
    return (a.to(dtype) @ unpacked(b).to(dtype)).to(torch.int32)
