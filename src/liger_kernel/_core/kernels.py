"""Triton building blocks shared by the ops' kernels. Imported only by `ops/<op>/triton.py`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from liger_kernel._core.launch import INTERPRET, cdiv

# A launch through `kernel[grid](...)` costs 42 us of host time on the H200 machine, most of it spent on finding the
# compiled kernel. `launch` finds it by a cheaper key. Before 3.3, Triton's compiled kernels took other arguments.
_FAST = not INTERPRET and tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 3)
_compiled: dict[Any, tuple[Any, tuple[Any, ...]]] = {}


def _kind(value: Any) -> Any:
    """What Triton specialises an argument on: dtype and alignment, 1, divisibility by 16 and width."""
    if isinstance(value, Tensor):
        return value.dtype, value.data_ptr() % 16 == 0
    if isinstance(value, int):
        return value == 1 or (value % 16 == 0, -(2**31) <= value < 2**31)
    return type(value)


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **constants: Any) -> None:
    """`kernel[grid](*args, **constants)`, faster; `args` are all run-time arguments, `constants` all others."""
    if not _FAST:
        kernel[grid](*args, **constants)
        return
    device = torch.cuda.current_device() if args[0].is_cuda else args[0].device.index
    key = (kernel.fn, device, *map(_kind, args), *constants.values())
    found = _compiled.get(key)
    if found is None:
        compiled = kernel[grid](*args, **constants)
        # the launcher takes every parameter by position and skips the constant ones
        tail = tuple(constants[name] for name in kernel.arg_names[len(args) :])
        _compiled[key] = compiled, tail
        return
    compiled, tail = found
    compiled[(*grid, 1, 1)[:3]](*args, *tail)


@triton.jit
def _column_sum(
    partial_ptr,
    first_ptr,
    second_ptr,
    n_rows,
    n_cols,
    PAIR: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
):
    """out[c] = sum_r partial[r, c], rows in a fixed order. Program (c, i) owns BLOCK_COLS columns of sum i."""
    cols = tl.program_id(0) * BLOCK_COLS + tl.arange(0, BLOCK_COLS)
    first_row = tl.program_id(1).to(tl.int64) * n_rows
    total = tl.zeros((BLOCK_ROWS, BLOCK_COLS), tl.float32)
    for start in range(0, n_rows, BLOCK_ROWS):
        rows = start + tl.arange(0, BLOCK_ROWS)
        mask = (rows < n_rows)[:, None] & (cols < n_cols)[None, :]
        at = (first_row + rows)[:, None] * n_cols + cols[None, :]
        total += tl.load(partial_ptr + at, mask=mask, other=0.0)
    out = tl.sum(total, 0)
    mask = (cols < n_cols) & (tl.program_id(1) == 0)
    tl.store(first_ptr + cols, out.to(first_ptr.dtype.element_ty), mask=mask)
    if PAIR:
        mask = (cols < n_cols) & (tl.program_id(1) == 1)
        tl.store(second_ptr + cols, out.to(second_ptr.dtype.element_ty), mask=mask)


def column_sums(partial: Tensor, dtypes: Sequence[torch.dtype]) -> list[Tensor]:
    """Deterministic sums over R of an fp32 (K, R, N) tensor, K one or two, each rounded once; one launch."""
    n_sums, n_rows, n_cols = partial.shape
    outs = [torch.empty(n_cols, dtype=dtype, device=partial.device) for dtype in dtypes]
    block_cols = 1024 if INTERPRET else 32  # the interpreter pays per program
    launch(
        _column_sum,
        (cdiv(n_cols, block_cols), n_sums),
        partial,
        outs[0],
        outs[-1],
        n_rows,
        n_cols,
        PAIR=n_sums == 2,
        BLOCK_ROWS=64,
        BLOCK_COLS=block_cols,
        num_warps=4,
    )
    return outs
