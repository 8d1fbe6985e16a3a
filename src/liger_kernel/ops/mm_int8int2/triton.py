"""The product of int8 with packed 2-bit integers: M K + K N / 4 bytes in and 4 M N out, 2 M N K operations in int8."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from liger_kernel._core.contract import Needs, Saved
from liger_kernel._core.shapes import cdiv
from liger_kernel.backends import facts_of
from liger_kernel.backends.kernels import launch
from liger_kernel.ops.mm_int8int2.contract import Int8Int2Options


@dataclass(frozen=True)
class Config:
    """One program owns a tile of rows x cols; of a column, `packed` bytes are read at a time, four terms each.

    Not measured: the tile of an int8 product, whose loads of `a` are 4 x 64 bytes a row.
    """

    rows: int = 64
    cols: int = 128
    packed: int = 64
    warps: int = 8  # with 4, registers spill
    stages: int = 3


@triton.jit
def _mm_int8int2(
    a_ptr,
    b_ptr,
    c_ptr,
    a_stride,
    b_stride,
    n_rows,
    n_cols,
    n_packed,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    PACKED: tl.constexpr,
    STAGES: tl.constexpr,
):
    """c = sum over four quarters of a_i @ (((b >> 2 i) & 3) - 1). One program owns ROWS x COLS of c."""
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    cols = tl.program_id(1) * COLS + tl.arange(0, COLS)
    total = tl.zeros((ROWS, COLS), dtype=tl.int32)
    terms = tl.arange(0, PACKED)
    for start in tl.range(0, n_packed, PACKED, num_stages=STAGES):
        inside = start + terms < n_packed
        b_at = b_ptr + (start + terms).to(tl.int64)[:, None] * b_stride + cols[None, :]
        packed = tl.load(b_at, mask=inside[:, None] & (cols < n_cols)[None, :], other=0)
        a_at = a_ptr + rows[:, None] * a_stride + (start + terms)[None, :]
        mask = (rows < n_rows)[:, None] & inside[None, :]
        for quarter in tl.static_range(4):
            a = tl.load(a_at + quarter * n_packed, mask=mask, other=0)
            weights = ((packed >> (2 * quarter)) & 3).to(tl.int8) - 1
            total = tl.dot(a, weights.to(tl.int8), total, out_dtype=tl.int32)
    c_at = c_ptr + rows[:, None] * n_cols + cols[None, :]
    tl.store(c_at, total, mask=(rows < n_rows)[:, None] & (cols < n_cols)[None, :])


def forward(
    a: Tensor, b: Tensor, *, options: Int8Int2Options, needs: Needs
) -> tuple[Tensor, Saved]:
    a, b = (t if t.stride(1) == 1 else t.contiguous() for t in (a, b))
    c = a.new_empty(a.shape[0], b.shape[1], dtype=torch.int32)
    config = Config()
    if c.numel():
        stages = facts_of(a.device).stages(
            config.stages, config.packed * (4 * config.rows + config.cols)
        )
        launch(
            _mm_int8int2,
            (cdiv(c.shape[0], config.rows), cdiv(c.shape[1], config.cols)),
            *(a, b, c, a.stride(0), b.stride(0), *c.shape, b.shape[0]),
            ROWS=config.rows,
            COLS=config.cols,
            PACKED=config.packed,
            STAGES=stages,
            num_warps=config.warps,
        )
    return c, ()
