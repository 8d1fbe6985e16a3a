"""Both thin products with dy, which is read once: two matrix products would read it twice, and do little else."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from liger_kernel._core.shapes import cdiv, next_power_of_2
from liger_kernel.backends import facts_of
from liger_kernel.backends.kernels import column_sums, for_dot, launch
from liger_kernel.backends.records import DeviceFacts

#: programs that are wanted: the fewer, the less is added up afterwards (H100, 8192x14336: 0.122 ms, 512: 0.132; two
#: matrix products: 0.165)
PROGRAMS = 256


@dataclass(frozen=True)
class Config:
    """Tiles of (rows, cols) of dy, `stages` of them in flight."""

    rows: int
    cols: int
    warps: int
    stages: int

    @staticmethod
    @functools.cache
    def of(n_cols: int, facts: DeviceFacts) -> Config:
        # the sums (cols, rank) and b stay in registers; where no unit multiplies matrices, wider ones spill
        widest = 128 if facts.architecture.startswith("rdna") else 256
        cols = min(widest, max(16, next_power_of_2(n_cols)))
        return Config(64, cols, 8, facts.stages(3, 64 * cols * 2))


@triton.jit
def _thin_gradients(
    dy_ptr,
    m_ptr,
    b_ptr,
    g_ptr,
    db_ptr,
    dy_stride,
    m_stride,
    b_stride,
    n_rows,
    n_cols,
    rank,
    rows_of_span,
    scaling,
    RANK: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    STAGES: tl.constexpr,
):
    """One program owns COLS columns of a span of rows: a share of dy b for these rows and of dy^T m for its columns."""
    span = tl.program_id(0)
    tile = tl.program_id(1)
    cols = tile * COLS + tl.arange(0, COLS)
    inner = tl.arange(0, RANK)
    of_b = (cols < n_cols)[:, None] & (inner < rank)[None, :]
    b = tl.load(b_ptr + cols.to(tl.int64)[:, None] * b_stride + inner[None, :], of_b, 0.0)
    b = for_dot(b)
    db = tl.zeros((COLS, RANK), tl.float32)
    first = span * rows_of_span
    last = tl.minimum(first + rows_of_span, n_rows)
    for start in tl.range(first, last, ROWS, num_stages=STAGES):
        rows = (start + tl.arange(0, ROWS)).to(tl.int64)
        of_m = (rows < last)[:, None] & (inner < rank)[None, :]
        of_dy = (rows < last)[:, None] & (cols < n_cols)[None, :]
        dy = tl.load(dy_ptr + rows[:, None] * dy_stride + cols[None, :], of_dy, 0.0)
        m = tl.load(m_ptr + rows[:, None] * m_stride + inner[None, :], of_m, 0.0)
        dy, m = for_dot(dy), for_dot(m)
        g = tl.dot(dy, b) * scaling
        g_at = (tile.to(tl.int64) * n_rows + rows)[:, None] * rank + inner[None, :]
        tl.store(g_ptr + g_at, g, of_m)
        db = tl.dot(tl.trans(dy), m, db)
    db_at = (span.to(tl.int64) * n_cols + cols)[:, None] * rank + inner[None, :]
    tl.store(db_ptr + db_at, db * scaling, of_b)


def thin_gradients(
    dy: Tensor, middle: Tensor, lora_b: Tensor, scaling: float
) -> tuple[Tensor, Tensor]:
    n_rows, n_cols = dy.shape
    rank = lora_b.shape[1]
    config = Config.of(n_cols, facts_of(dy.device))
    tiles = cdiv(n_cols, config.cols)
    spans = min(cdiv(n_rows, config.rows), max(1, PROGRAMS // tiles))
    rows_of_span = cdiv(cdiv(n_rows, spans), config.rows) * config.rows
    spans = cdiv(n_rows, rows_of_span)
    g = dy.new_empty(1, tiles, n_rows * rank, dtype=torch.float32)
    db = dy.new_empty(1, spans, n_cols * rank, dtype=torch.float32)
    launch(
        _thin_gradients,
        (spans, tiles),
        dy,
        middle,
        lora_b,
        g,
        db,
        dy.stride(0),
        middle.stride(0),
        lora_b.stride(0),
        n_rows,
        n_cols,
        rank,
        rows_of_span,
        scaling,
        RANK=max(16, next_power_of_2(rank)),
        ROWS=config.rows,
        COLS=config.cols,
        STAGES=config.stages,
        num_warps=config.warps,
    )
    (of_rows,), (of_cols,) = column_sums(g, [dy.dtype]), column_sums(db, [dy.dtype])
    return of_rows.view(n_rows, rank), of_cols.view(n_cols, rank)
