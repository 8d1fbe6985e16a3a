"""Helpers for code that launches Triton kernels."""

from __future__ import annotations

import contextlib
import functools
import os
from contextlib import AbstractContextManager

import torch

INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"

#: of one program: 1024 threads, 64 to a warp on AMD
MOST_WARPS = 32 if torch.version.hip is None else 16

_NULL = contextlib.nullcontext()


def device_guard(device: torch.device) -> AbstractContextManager[object]:
    """Make `device` current for the launches inside; free when it already is."""
    if device.type == "cuda":
        if device.index == torch.cuda.current_device():
            return _NULL
        return torch.cuda.device(device)
    if device.type == "xpu":
        return torch.xpu.device(device)
    return _NULL


@functools.cache
def processor_count(device: torch.device) -> int:
    """Number of streaming multiprocessors (compute units); 2 under the CPU interpreter, to exercise partial sums."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).multi_processor_count
    if device.type == "xpu":
        return torch.xpu.get_device_properties(device).gpu_subslice_count
    return 2


@functools.cache
def shared_memory(device: torch.device) -> int:
    """Bytes that a program may take to load ahead; 0 where loading ahead through it was not measured."""
    if device.type != "cuda" or torch.version.hip is not None:
        return 0
    return getattr(torch.cuda.get_device_properties(device), "shared_memory_per_block_optin", 0)


def next_power_of_2(n: int) -> int:
    return 1 << max(0, n - 1).bit_length()


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def as_rows(x: torch.Tensor) -> torch.Tensor:
    """View (copy only where the strides force it) as (R, N) with unit stride along N."""
    rows = x.reshape(-1, x.shape[-1]) if x.ndim != 2 else x
    return rows if rows.stride(1) == 1 or rows.shape[1] == 1 else rows.contiguous()
