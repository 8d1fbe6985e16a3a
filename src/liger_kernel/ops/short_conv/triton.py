"""Kernels of the gated short convolution. Forward moves 4 C elements of a token, backward 7 C: what a tap reads of
earlier or later tokens lies in the caches, since their own taps read it."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from liger_kernel._core.contract import Grads, Needs, Saved
from liger_kernel._core.shapes import as_rows, cdiv, next_power_of_2
from liger_kernel.backends import facts_of
from liger_kernel.backends.kernels import column_sums, launch
from liger_kernel.backends.records import DeviceFacts
from liger_kernel.ops.short_conv.contract import ShortConvOptions


@dataclass(frozen=True)
class Config:
    """Tiles of (rows, cols): tokens, one after the other, and channels. In backward a thread holds a sum for each of
    its elements and taps, which bounds these, and `programs` share the tokens.

    H100, 16384 x 2048: 0.091 and 0.180 ms; backward in tiles of 256 columns 0.260.
    """

    rows: int
    cols: int
    warps: int
    programs: int = 0

    @staticmethod
    @functools.cache
    def forward(n_cols: int) -> Config:
        cols = min(128, max(64, next_power_of_2(n_cols)))
        return Config(8, cols, warps=cols // 64)

    @staticmethod
    @functools.cache
    def backward(facts: DeviceFacts, n_cols: int, taps: int) -> Config:
        cols = min(128, max(64, next_power_of_2(n_cols)))
        rows = 16 if taps < 4 else 8  # a fourth tap would spill
        return Config(rows, cols, warps=rows * cols // 256, programs=4 * facts.processors)


def unserved(
    bcx: Tensor, weight: Tensor, bias: Tensor | None, *, options: ShortConvOptions
) -> str | None:
    taps = weight.shape[1]
    return f"{taps} taps; the kernels hold a sum for each of up to 4" if taps > 4 else None


@triton.jit
def _place(tile, n_rows, n_steps, ROWS: tl.constexpr):
    """Rows (64-bit) of a tile, their mask, and which token of its sequence each of them is."""
    rows = tile * ROWS + tl.arange(0, ROWS).to(tl.int64)
    step = (tile * ROWS % n_steps + tl.arange(0, ROWS)) % n_steps  # in 32 bits
    return rows, rows < n_rows, step


@triton.jit
def _load(ptr, rows, stride, cols, mask):
    return tl.load(ptr + rows[:, None] * stride + cols[None, :], mask=mask, other=0.0).to(
        tl.float32
    )


@triton.jit
def _short_conv_fwd(
    bcx_ptr,
    w_ptr,
    bias_ptr,
    y_ptr,
    stride,
    n_rows,
    n_steps,
    n_cols,
    HAS_BIAS: tl.constexpr,
    TAPS: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """y[t] = C[t] (bias + sum_k w[k] (B x)[t - TAPS + 1 + k]). One program owns ROWS tokens of COLS channels."""
    tiles = tl.cdiv(n_cols, COLS)
    rows, row_mask, step = _place(tl.program_id(0) // tiles, n_rows, n_steps, ROWS)
    cols = (tl.program_id(0) % tiles) * COLS + tl.arange(0, COLS)
    col_mask = cols < n_cols
    mask = row_mask[:, None] & col_mask[None, :]
    total = tl.zeros((ROWS, COLS), tl.float32)
    if HAS_BIAS:
        total += tl.load(bias_ptr + cols, mask=col_mask, other=0.0).to(tl.float32)[None, :]
    for k in tl.static_range(TAPS):
        back = TAPS - 1 - k
        there = mask & (step >= back)[:, None]
        b = _load(bcx_ptr, rows - back, stride, cols, there)
        x = _load(bcx_ptr + 2 * n_cols, rows - back, stride, cols, there)
        w = tl.load(w_ptr + cols * TAPS + k, mask=col_mask, other=0.0).to(tl.float32)
        total += w[None, :] * (b * x)
    y = total * _load(bcx_ptr + n_cols, rows, stride, cols, mask)
    at = y_ptr + rows[:, None] * n_cols + cols[None, :]
    tl.store(at, y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit(
    do_not_specialize=["n_parts"]
)  # of one part the compiler makes a loop that spills on Hopper
def _short_conv_bwd(
    dy_ptr,
    bcx_ptr,
    w_ptr,
    bias_ptr,
    dbcx_ptr,
    dw_ptr,
    dbias_ptr,
    dy_stride,
    stride,
    n_rows,
    n_steps,
    n_cols,
    n_parts,
    HAS_BIAS: tl.constexpr,
    NEEDS_DX: tl.constexpr,
    NEEDS_DW: tl.constexpr,
    TAPS: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """With z = B x, c what C multiplies, and dc = dy C: dC = dy c, and dz[t] = sum_k w[k] dc[t + TAPS - 1 - k], of
    which dB = dz x and dx = dz B; over the tokens dw[k] = sum of dc[t] z[t - TAPS + 1 + k], dbias = sum of dc.

    One program owns COLS channels of the tiles of tokens that are `part` modulo the parts, and their sums.
    """
    part = tl.program_id(0) % n_parts
    cols = (tl.program_id(0) // n_parts) * COLS + tl.arange(0, COLS)
    col_mask = cols < n_cols
    db = tl.zeros((ROWS, COLS), tl.float32)
    dw0 = tl.zeros((ROWS, COLS), tl.float32)
    dw1 = tl.zeros((ROWS, COLS), tl.float32)
    dw2 = tl.zeros((ROWS, COLS), tl.float32)
    dw3 = tl.zeros((ROWS, COLS), tl.float32)
    for tile in range(part, tl.cdiv(n_rows, ROWS), n_parts):
        rows, row_mask, step = _place(tile, n_rows, n_steps, ROWS)
        mask = row_mask[:, None] & col_mask[None, :]
        dy = _load(dy_ptr, rows, dy_stride, cols, mask)
        dc = dy * _load(bcx_ptr + n_cols, rows, stride, cols, mask)
        conv = tl.zeros((ROWS, COLS), tl.float32)
        dz = tl.zeros((ROWS, COLS), tl.float32)
        for k in tl.static_range(TAPS):
            away = TAPS - 1 - k
            w = tl.load(w_ptr + cols * TAPS + k, mask=col_mask, other=0.0).to(tl.float32)[None, :]
            before = mask & (step >= away)[:, None]
            z = _load(bcx_ptr, rows - away, stride, cols, before)
            z *= _load(bcx_ptr + 2 * n_cols, rows - away, stride, cols, before)
            conv += w * z
            if NEEDS_DW:
                if k == 0:
                    dw0 += dc * z
                elif k == 1:
                    dw1 += dc * z
                elif k == 2:
                    dw2 += dc * z
                else:
                    dw3 += dc * z
            if NEEDS_DX:
                after = mask & (step < n_steps - away)[:, None]
                later = _load(dy_ptr, rows + away, dy_stride, cols, after)
                later *= _load(bcx_ptr + n_cols, rows + away, stride, cols, after)
                dz += w * later
        if NEEDS_DW:
            db += dc
        if NEEDS_DX:
            if HAS_BIAS:
                conv += tl.load(bias_ptr + cols, mask=col_mask, other=0.0).to(tl.float32)[None, :]
            b = _load(bcx_ptr, rows, stride, cols, mask)
            x = _load(bcx_ptr + 2 * n_cols, rows, stride, cols, mask)
            at = dbcx_ptr + rows[:, None] * (3 * n_cols) + cols[None, :]
            tl.store(at, (dz * x).to(dbcx_ptr.dtype.element_ty), mask=mask)
            tl.store(at + n_cols, (dy * conv).to(dbcx_ptr.dtype.element_ty), mask=mask)
            tl.store(at + 2 * n_cols, (dz * b).to(dbcx_ptr.dtype.element_ty), mask=mask)
    if NEEDS_DW:
        first = part.to(tl.int64) * n_cols
        to = dw_ptr + (first + cols) * TAPS
        tl.store(to, tl.sum(dw0, 0), mask=col_mask)
        if TAPS > 1:
            tl.store(to + 1, tl.sum(dw1, 0), mask=col_mask)
        if TAPS > 2:
            tl.store(to + 2, tl.sum(dw2, 0), mask=col_mask)
        if TAPS > 3:
            tl.store(to + 3, tl.sum(dw3, 0), mask=col_mask)
        if HAS_BIAS:
            tl.store(dbias_ptr + first + cols, tl.sum(db, 0), mask=col_mask)


def forward(
    bcx: Tensor, weight: Tensor, bias: Tensor | None, *, options: ShortConvOptions, needs: Needs
) -> tuple[Tensor, Saved]:
    rows, weight = as_rows(bcx), weight.contiguous()
    bias = None if bias is None else bias.contiguous()
    n_cols, taps = weight.shape
    y = bcx.new_empty(*bcx.shape[:-1], n_cols)
    if y.numel():
        config = Config.forward(n_cols)
        launch(
            _short_conv_fwd,
            (cdiv(rows.shape[0], config.rows) * cdiv(n_cols, config.cols),),
            *(rows, weight, bias, y, rows.stride(0), rows.shape[0], bcx.shape[-2], n_cols),
            HAS_BIAS=bias is not None,
            TAPS=taps,
            ROWS=config.rows,
            COLS=config.cols,
            num_warps=config.warps,
        )
    return y, (rows, weight, bias)


def backward(grads: Any, saved: Any, *, options: ShortConvOptions, needs: Needs) -> Grads:
    (dy,), (rows, weight, bias) = grads, saved
    n_rows, (n_cols, taps) = rows.shape[0], weight.shape
    needs_dx, needs_dw = needs[0], any(needs[1:])
    dbcx = rows.new_empty(*dy.shape[:-1], 3 * n_cols) if needs_dx else None
    config = Config.backward(facts_of(rows.device), n_cols, taps)
    tiles = cdiv(n_cols, config.cols)
    parts = max(1, min(cdiv(config.programs, tiles), cdiv(n_rows, config.rows)))
    dw = rows.new_empty(1, parts, n_cols * taps, dtype=torch.float32) if needs_dw else None
    dbias = None if bias is None or dw is None else dw.new_empty(1, parts, n_cols)
    of_dy = as_rows(dy)
    if n_cols:
        launch(
            _short_conv_bwd,
            (tiles * parts,),
            *(of_dy, rows, weight, bias, dbcx, dw, dbias, of_dy.stride(0), rows.stride(0)),
            *(n_rows, max(1, dy.shape[-2]), n_cols, parts),
            HAS_BIAS=bias is not None,
            NEEDS_DX=needs_dx,
            NEEDS_DW=needs_dw,
            TAPS=taps,
            ROWS=config.rows,
            COLS=config.cols,
            num_warps=config.warps,
        )
    return (
        dbcx,
        column_sums(dw, [weight.dtype])[0].view(n_cols, taps) if needs[1] else None,
        column_sums(dbias, [bias.dtype])[0] if needs[2] else None,
    )
