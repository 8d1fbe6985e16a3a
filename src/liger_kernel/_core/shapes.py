"""Arithmetic of blocks and rows."""

from __future__ import annotations

import torch
from torch import Tensor


def next_power_of_2(n: int) -> int:
    return 1 << max(0, n - 1).bit_length()


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def as_rows(x: Tensor) -> Tensor:
    """View (copy only where the strides force it) as (R, N) with unit stride along N."""
    rows = x.reshape(-1, x.shape[-1]) if x.ndim != 2 else x
    return rows if rows.stride(1) == 1 or rows.shape[1] == 1 else rows.contiguous()


def in_dtype(x: Tensor, dtype: torch.dtype) -> Tensor:
    """`x.to(dtype)`, which costs the host eight times as much where x is in it already."""
    return x if x.dtype == dtype else x.to(dtype)
