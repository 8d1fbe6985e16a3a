"""The gated product of Linears with adapters, whose thin products are made while gate and up are in registers.

A GEMM that adds a thin product reads and writes all of (T, F) for it. Here only what `glu` moves is moved: 3 n elements
forward, 5 n backward. The gradients of B, and of A of the Linear after it, are made from tiles that are there, too.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from liger_kernel._core.shapes import cdiv, next_power_of_2
from liger_kernel.backends import facts_of
from liger_kernel.backends.kernels import column_sums, for_dot, launch
from liger_kernel.backends.records import DeviceFacts
from liger_kernel.ops.glu.contract import GLUOptions
from liger_kernel.ops.glu.triton import gated
from liger_kernel.ops.lora_mlp.contract import Thin

#: beyond it the sums of the backward fill the registers
RANK = 32


@dataclass(frozen=True)
class Config:
    """Tiles of (rows, cols), `stages` of them in flight, on about so many `programs`."""

    rows: int
    cols: int
    warps: int
    stages: int
    programs: int

    @staticmethod
    @functools.cache
    def forward(rank: int, n_cols: int, facts: DeviceFacts) -> Config:
        # loads of single elements spill, as products do where no unit multiplies matrices
        rdna = facts.architecture.startswith("rdna")
        rows, cols = 16 if rdna or n_cols % 16 else 64, 32 if rdna else 64
        return Config(rows, cols, 4, facts.stages(3, cols * (rows * 4 + rank * 6)), 264)

    @staticmethod
    @functools.cache
    def backward(rank: int, facts: DeviceFacts) -> Config:
        rows, cols = (16, 32) if facts.architecture.startswith("rdna") else (32, 64)
        return Config(rows, cols, 4, facts.stages(3, rows * (cols + rank) * 6), 2112)

    def spans(self, length: int, step: int, tiles: int) -> tuple[int, int]:
        """Into how many parts `length` is cut, a program for each and each of `tiles`, and their lengths."""
        wanted = min(cdiv(length, step), max(1, self.programs // tiles))
        of_one = cdiv(cdiv(length, wanted), step) * step
        return cdiv(length, of_one), of_one


@triton.jit
def _load(ptr, outer, stride, inner, mask):
    """Elements (outer, inner) of a matrix with unit stride along its rows, for a product."""
    return for_dot(tl.load(ptr + outer.to(tl.int64) * stride + inner, mask, 0.0))


@triton.jit
def _round(x, dtype):
    """Rounded to `dtype`, for a product."""
    return for_dot(x.to(dtype))


@triton.jit
def _lora_glu_fwd(
    gate_ptr,
    up_ptr,
    y_ptr,
    middle_ptr,
    gate_stride,
    up_stride,
    a_ptr,
    a_stride,
    a_rank,
    gate_m_ptr,
    gate_b_ptr,
    gate_m_stride,
    gate_b_stride,
    gate_scaling,
    gate_rank,
    up_m_ptr,
    up_b_ptr,
    up_m_stride,
    up_b_stride,
    up_scaling,
    up_rank,
    n_rows,
    n_cols,
    span_cols,
    gate_multiplier,
    down_multiplier,
    limit,
    alpha,
    ACTIVATION: tl.constexpr,
    LIMITED: tl.constexpr,
    RANK: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    STAGES: tl.constexpr,
):
    """As `_glu_fwd`. One program owns a span of columns of ROWS rows, and its share of y a^T."""
    rows = (tl.program_id(0) * ROWS + tl.arange(0, ROWS))[:, None]
    span = tl.program_id(1)
    rank = tl.arange(0, RANK)[None, :]
    dtype = y_ptr.dtype.element_ty
    of_rows = rows < n_rows
    gate_m = _load(gate_m_ptr, rows, gate_m_stride, rank, of_rows & (rank < gate_rank))
    up_m = _load(up_m_ptr, rows, up_m_stride, rank, of_rows & (rank < up_rank))
    middle = tl.zeros((ROWS, RANK), tl.float32)
    first = span * span_cols
    last = tl.minimum(first + span_cols, n_cols)
    for start in tl.range(first, last, COLS, num_stages=STAGES):
        along = start + tl.arange(0, COLS)
        cols, down = along[None, :], along[:, None]
        mask = of_rows & (cols < last)
        gate = _load(gate_ptr, rows, gate_stride, cols, mask).to(tl.float32)
        up = _load(up_ptr, rows, up_stride, cols, mask).to(tl.float32)
        gate_b = _load(gate_b_ptr, down, gate_b_stride, rank, (down < last) & (rank < gate_rank))
        up_b = _load(up_b_ptr, down, up_b_stride, rank, (down < last) & (rank < up_rank))
        gate += tl.dot(gate_m, tl.trans(gate_b)) * gate_scaling
        up += tl.dot(up_m, tl.trans(up_b)) * up_scaling
        value, _, factor = gated(
            gate * gate_multiplier, up, limit, alpha, dtype, ACTIVATION, LIMITED
        )
        y = _round(value * factor * down_multiplier, dtype)
        tl.store(y_ptr + rows.to(tl.int64) * n_cols + cols, y.to(dtype), mask)
        inner = tl.arange(0, RANK)[:, None]
        a = _load(a_ptr, inner, a_stride, cols, (inner < a_rank) & (cols < last))
        middle = tl.dot(y, tl.trans(a), middle)
    at = (span.to(tl.int64) * n_rows + rows) * a_rank + rank
    tl.store(middle_ptr + at, middle, of_rows & (rank < a_rank))


@triton.jit
def _lora_glu_bwd(
    dy_ptr,
    gate_ptr,
    up_ptr,
    dgate_ptr,
    dup_ptr,
    sums_ptr,
    dy_stride,
    gate_stride,
    up_stride,
    dgate_stride,
    dup_stride,
    inner_ptr,
    a_ptr,
    inner_stride,
    a_stride,
    a_rank,
    gate_m_ptr,
    gate_b_ptr,
    gate_m_stride,
    gate_b_stride,
    gate_scaling,
    gate_rank,
    up_m_ptr,
    up_b_ptr,
    up_m_stride,
    up_b_stride,
    up_scaling,
    up_rank,
    n_rows,
    n_cols,
    span_rows,
    gate_multiplier,
    down_multiplier,
    limit,
    alpha,
    ACTIVATION: tl.constexpr,
    LIMITED: tl.constexpr,
    RANK: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    STAGES: tl.constexpr,
):
    """As `_glu_bwd`, of dy + inner a. One program owns COLS columns of a span of rows, and their share of
    dgate^T gate_m, dup^T up_m (F, r) and inner^T y (r, F), which lie side by side.
    """
    span = tl.program_id(0)
    along = tl.program_id(1) * COLS + tl.arange(0, COLS)
    cols, down = along[None, :], along[:, None]
    rank, inner = tl.arange(0, RANK)[None, :], tl.arange(0, RANK)[:, None]
    dtype = dy_ptr.dtype.element_ty
    of_gate_b = (down < n_cols) & (rank < gate_rank)
    of_up_b = (down < n_cols) & (rank < up_rank)
    of_a = (inner < a_rank) & (cols < n_cols)
    gate_b = _load(gate_b_ptr, down, gate_b_stride, rank, of_gate_b)
    up_b = _load(up_b_ptr, down, up_b_stride, rank, of_up_b)
    a = _load(a_ptr, inner, a_stride, cols, of_a)
    dgate_b = tl.zeros((COLS, RANK), tl.float32)
    dup_b = tl.zeros((COLS, RANK), tl.float32)
    da = tl.zeros((COLS, RANK), tl.float32)
    first = span * span_rows
    last = tl.minimum(first + span_rows, n_rows)
    for start in tl.range(first, last, ROWS, num_stages=STAGES):
        rows = (start + tl.arange(0, ROWS))[:, None]
        of_rows = rows < last
        mask = of_rows & (cols < n_cols)
        gate = _load(gate_ptr, rows, gate_stride, cols, mask).to(tl.float32)
        up = _load(up_ptr, rows, up_stride, cols, mask).to(tl.float32)
        dy = _load(dy_ptr, rows, dy_stride, cols, mask).to(tl.float32)
        gate_m = _load(gate_m_ptr, rows, gate_m_stride, rank, of_rows & (rank < gate_rank))
        up_m = _load(up_m_ptr, rows, up_m_stride, rank, of_rows & (rank < up_rank))
        thin = _load(inner_ptr, rows, inner_stride, rank, of_rows & (rank < a_rank))
        gate += tl.dot(gate_m, tl.trans(gate_b)) * gate_scaling
        up += tl.dot(up_m, tl.trans(up_b)) * up_scaling
        dy = (dy + tl.dot(thin, a)) * down_multiplier
        value, slope, factor = gated(
            gate * gate_multiplier, up, limit, alpha, dtype, ACTIVATION, LIMITED
        )
        dup = dy * value
        if LIMITED:
            dup = tl.where(tl.abs(up) <= limit, dup, 0.0)
        dgate = _round(dy * factor * slope * gate_multiplier, dtype)
        dup = _round(dup, dtype)
        tl.store(dgate_ptr + rows.to(tl.int64) * dgate_stride + cols, dgate.to(dtype), mask)
        tl.store(dup_ptr + rows.to(tl.int64) * dup_stride + cols, dup.to(dtype), mask)
        y = _round(value * factor * down_multiplier, dtype)
        dgate_b = tl.dot(tl.trans(dgate), gate_m, dgate_b)
        dup_b = tl.dot(tl.trans(dup), up_m, dup_b)
        da = tl.dot(tl.trans(y), thin, da)
    at = sums_ptr + span.to(tl.int64) * n_cols * (gate_rank + up_rank + a_rank)
    tl.store(at + down * gate_rank + rank, dgate_b * gate_scaling, of_gate_b)
    at += n_cols * gate_rank
    tl.store(at + down * up_rank + rank, dup_b * up_scaling, of_up_b)
    at += n_cols * up_rank
    tl.store(at + inner * n_cols + cols, tl.trans(da), of_a)


def _of_thin(*thin: Thin) -> tuple[Any, ...]:
    args: list[Any] = []
    for middle, lora_b, scaling in thin:
        b = lora_b.contiguous()
        args += middle, b, middle.stride(0), b.stride(0), scaling, b.shape[1]
    return tuple(args)


def _launch(
    kernel: Any,
    grid: tuple[int, int],
    args: tuple[Any, ...],
    options: GLUOptions,
    config: Config,
    rank: int,
) -> None:
    launch(
        kernel,
        grid,
        *args,
        options.gate_multiplier,
        options.down_multiplier,
        0.0 if options.limit is None else options.limit,
        options.alpha,
        ACTIVATION=options.activation,
        LIMITED=options.limit is not None,
        RANK=rank,
        ROWS=config.rows,
        COLS=config.cols,
        STAGES=config.stages,
        num_warps=config.warps,
    )


def forward(
    gate: Tensor, up: Tensor, of_gate: Thin, of_up: Thin, lora_a: Tensor, *, options: GLUOptions
) -> tuple[Tensor, Tensor]:
    (n_rows, n_cols), a = gate.shape, lora_a.contiguous()
    ranks = a.shape[0], of_gate.lora_b.shape[1], of_up.lora_b.shape[1]
    rank = max(16, next_power_of_2(max(ranks)))
    config = Config.forward(rank, n_cols, facts_of(gate.device))
    tiles = cdiv(n_rows, config.rows)
    spans, span_cols = config.spans(n_cols, config.cols, tiles)
    y = gate.new_empty(n_rows, n_cols)
    middle = gate.new_empty(1, spans, n_rows * ranks[0], dtype=torch.float32)
    args = (gate, up, y, middle, gate.stride(0), up.stride(0), a, a.stride(0), ranks[0])
    args += (*_of_thin(of_gate, of_up), n_rows, n_cols, span_cols)
    _launch(_lora_glu_fwd, (tiles, spans), args, options, config, rank)
    return y, column_sums(middle, [gate.dtype])[0].view(n_rows, -1)


def backward(
    dy: Tensor,
    gate: Tensor,
    up: Tensor,
    of_gate: Thin,
    of_up: Thin,
    inner: Tensor,
    lora_a: Tensor,
    *,
    options: GLUOptions,
    into: tuple[Tensor, Tensor] | None,
) -> tuple[Tensor, ...]:
    (n_rows, n_cols), a = gate.shape, lora_a.contiguous()
    ranks = of_gate.lora_b.shape[1], of_up.lora_b.shape[1], a.shape[0]
    rank = max(16, next_power_of_2(max(ranks)))
    config = Config.backward(rank, facts_of(gate.device))
    tiles = cdiv(n_cols, config.cols)
    spans, span_rows = config.spans(n_rows, config.rows, tiles)
    dgate, dup = into or (torch.empty_like(gate), torch.empty_like(up))
    sums = gate.new_empty(1, spans, n_cols * sum(ranks), dtype=torch.float32)
    large = dy, gate, up, dgate, dup
    args = (*large, sums, *(t.stride(0) for t in large), inner, a, inner.stride(0), a.stride(0))
    args += (ranks[2], *_of_thin(of_gate, of_up), n_rows, n_cols, span_rows)
    _launch(_lora_glu_bwd, (spans, tiles), args, options, config, rank)
    dgate_b, dup_b, da = column_sums(sums, [gate.dtype])[0].split([n_cols * r for r in ranks])
    return dgate, dup, dgate_b.view(n_cols, -1), dup_b.view(n_cols, -1), da.view(-1, n_cols)
