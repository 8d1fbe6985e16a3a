"""Kernels that mix streams. Forward moves (I + O + 1) C elements of a token, backward (2 I + O + 2) C."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from liger_kernel._core.contract import Grads, Needs, Saved
from liger_kernel._core.shapes import cdiv, next_power_of_2
from liger_kernel.backends.kernels import launch
from liger_kernel.ops.mhc_mix.contract import MHCMixOptions


@dataclass(frozen=True)
class Config:
    """All streams of a token, COLS columns at a time: a thread has every stream of its columns, and so all sums over
    streams are its own. In backward it holds O x I sums for each of its columns, which bounds these."""

    cols: int
    warps: int = 4

    @staticmethod
    @functools.cache
    def of(n_cols: int, pairs: int) -> Config:
        """`pairs`: sums that a thread holds for each column."""
        of_thread = 1 << (max(1, min(8, 64 // pairs)).bit_length() - 1)
        cols = min(128 * of_thread, max(32, next_power_of_2(n_cols)))
        return Config(cols, warps=4 if pairs <= 128 else 8)


@triton.jit
def _streams(
    ptr, row, row_stride, stride, cols, n, n_cols, STREAMS: tl.constexpr, COLS: tl.constexpr
):
    """(STREAMS, COLS) of a token in fp32."""
    s = tl.arange(0, STREAMS)[:, None]
    mask = (s < n) & (cols < n_cols)[None, :]
    at = ptr + row * row_stride + s.to(tl.int64) * stride + cols[None, :]
    return tl.load(at, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _weights(ptr, row, n_out, n_in, OUT: tl.constexpr, IN: tl.constexpr):
    """(OUT, IN) of a token in fp32."""
    o, i = tl.arange(0, OUT)[:, None], tl.arange(0, IN)[None, :]
    at = ptr + (row * n_out + o) * n_in + i
    return tl.load(at, mask=(o < n_out) & (i < n_in), other=0.0).to(tl.float32)


@triton.jit
def _mhc_mix_fwd(
    x_ptr,
    w_ptr,
    f_ptr,
    p_ptr,
    y_ptr,
    x_row,
    x_stream,
    f_row,
    n_cols,
    n_in,
    n_out,
    HAS_F: tl.constexpr,
    IN: tl.constexpr,
    OUT: tl.constexpr,
    COLS: tl.constexpr,
):
    """y[o] = sum_i w[o, i] x[i] + p[o] f. One program owns COLS columns of all streams of one token."""
    tiles = tl.cdiv(n_cols, COLS)
    row = (tl.program_id(0) // tiles).to(tl.int64)
    cols = (tl.program_id(0) % tiles) * COLS + tl.arange(0, COLS)
    x = _streams(x_ptr, row, x_row, x_stream, cols, n_in, n_cols, IN, COLS)
    w = _weights(w_ptr, row, n_out, n_in, OUT, IN)
    y = tl.sum(w[:, :, None] * x[None, :, :], 1)  # (OUT, COLS)
    o = tl.arange(0, OUT)
    if HAS_F:
        f = tl.load(f_ptr + row * f_row + cols, mask=cols < n_cols, other=0.0).to(tl.float32)
        p = tl.load(p_ptr + row * n_out + o, mask=o < n_out, other=0.0).to(tl.float32)
        y += p[:, None] * f[None, :]
    mask = (o < n_out)[:, None] & (cols < n_cols)[None, :]
    at = y_ptr + (row * n_out + o[:, None]) * n_cols + cols[None, :]
    tl.store(at, y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _mhc_mix_bwd(
    dy_ptr,
    x_ptr,
    w_ptr,
    f_ptr,
    p_ptr,
    dx_ptr,
    dw_ptr,
    df_ptr,
    dp_ptr,
    dy_row,
    dy_stream,
    x_row,
    x_stream,
    f_row,
    n_cols,
    n_in,
    n_out,
    NEEDS_DX: tl.constexpr,
    NEEDS_DW: tl.constexpr,
    NEEDS_DF: tl.constexpr,
    NEEDS_DP: tl.constexpr,
    IN: tl.constexpr,
    OUT: tl.constexpr,
    COLS: tl.constexpr,
):
    """dx[i] = sum_o w[o, i] dy[o], df = sum_o p[o] dy[o]; over the columns dw[o, i] = sum of dy[o] x[i], dp[o] = sum of
    dy[o] f. One program owns one token."""
    row = tl.program_id(0).to(tl.int64)
    o, i = tl.arange(0, OUT), tl.arange(0, IN)
    w = _weights(w_ptr, row, n_out, n_in, OUT, IN)
    if NEEDS_DF:
        p = tl.load(p_ptr + row * n_out + o, mask=o < n_out, other=0.0).to(tl.float32)
    dw = tl.zeros((OUT, IN, COLS), tl.float32)
    dp = tl.zeros((OUT, COLS), tl.float32)
    for start in range(0, n_cols, COLS):
        cols = start + tl.arange(0, COLS)
        dy = _streams(dy_ptr, row, dy_row, dy_stream, cols, n_out, n_cols, OUT, COLS)
        if NEEDS_DX:
            dx = tl.sum(w[:, :, None] * dy[:, None, :], 0).to(dx_ptr.dtype.element_ty)
            mask = (i < n_in)[:, None] & (cols < n_cols)[None, :]
            at = dx_ptr + (row * n_in + i[:, None]) * n_cols + cols[None, :]
            tl.store(at, dx, mask=mask)
        if NEEDS_DW:
            x = _streams(x_ptr, row, x_row, x_stream, cols, n_in, n_cols, IN, COLS)
            dw += dy[:, None, :] * x[None, :, :]
        if NEEDS_DF:
            df = tl.sum(p[:, None] * dy, 0).to(df_ptr.dtype.element_ty)
            tl.store(df_ptr + row * n_cols + cols, df, mask=cols < n_cols)
        if NEEDS_DP:
            f = tl.load(f_ptr + row * f_row + cols, mask=cols < n_cols, other=0.0).to(tl.float32)
            dp += dy * f[None, :]
    if NEEDS_DW:
        at = dw_ptr + (row * n_out + o[:, None]) * n_in + i[None, :]
        mask = (o < n_out)[:, None] & (i < n_in)[None, :]
        tl.store(at, tl.sum(dw, 2).to(dw_ptr.dtype.element_ty), mask=mask)
    if NEEDS_DP:
        tl.store(
            dp_ptr + row * n_out + o, tl.sum(dp, 1).to(dp_ptr.dtype.element_ty), mask=o < n_out
        )


def _as_streams(x: Tensor) -> Tensor:
    """(T, S, C) with unit stride along C."""
    streams = x.reshape(-1, *x.shape[-2:])
    return streams if streams.stride(2) == 1 else streams.contiguous()


def _as_rows(f: Tensor | None) -> tuple[Tensor | None, int]:
    """(T, C) with unit stride along C, and the stride along T."""
    if f is None:
        return None, 0
    rows = f.reshape(-1, f.shape[-1])
    rows = rows if rows.stride(1) == 1 else rows.contiguous()
    return rows, rows.stride(0)


def forward(
    x: Tensor,
    weights: Tensor,
    f: Tensor | None,
    f_weights: Tensor | None,
    *,
    options: MHCMixOptions,
    needs: Needs,
) -> tuple[Tensor, Saved]:
    streams, w = _as_streams(x), weights.contiguous()
    rows, f_stride = _as_rows(f)
    p = None if f_weights is None else f_weights.contiguous()
    n_rows, n_in, n_cols = streams.shape
    n_out = w.shape[-2]
    y = x.new_empty(*x.shape[:-2], n_out, n_cols)
    config = Config.of(n_cols, max(n_in, n_out))
    if y.numel():
        launch(
            _mhc_mix_fwd,
            (n_rows * cdiv(n_cols, config.cols),),
            *(streams, w, rows, p, y, *streams.stride()[:2], f_stride, n_cols, n_in, n_out),
            HAS_F=rows is not None,
            **_padded(n_in, n_out, config),
        )
    _, needs_dw, needs_df, needs_dp = needs
    return y, (
        streams if needs_dw else None,
        w,
        rows if needs_dp else None,
        p if needs_df or needs_dp else None,
    )


def _padded(n_in: int, n_out: int, config: Config) -> dict[str, Any]:
    return {
        "IN": next_power_of_2(n_in),
        "OUT": next_power_of_2(n_out),
        "COLS": config.cols,
        "num_warps": config.warps,
    }


def backward(grads: Any, saved: Any, *, options: MHCMixOptions, needs: Needs) -> Grads:
    x, w, f, p = saved
    shape, dy = grads[0].shape, _as_streams(grads[0])
    n_rows, n_out, n_cols = dy.shape
    n_in = w.shape[-1]
    needs_dx, needs_dw, needs_df, needs_dp = needs
    dx = dy.new_empty(*shape[:-2], n_in, n_cols) if needs_dx else None
    dw = w.new_empty(w.shape) if needs_dw else None
    df = dy.new_empty(*shape[:-2], n_cols) if needs_df else None
    dp = None if p is None or not needs_dp else p.new_empty(p.shape)
    config = Config.of(n_cols, n_out * (n_in + 1) if needs_dw or needs_dp else max(n_in, n_out))
    x_row, x_stream = (0, 0) if x is None else x.stride()[:2]
    if n_rows and n_cols:
        launch(
            _mhc_mix_bwd,
            (n_rows,),
            *(dy, x, w, f, p, dx, dw, df, dp, *dy.stride()[:2], x_row, x_stream),
            *(0 if f is None else f.stride(0), n_cols, n_in, n_out),
            NEEDS_DX=needs_dx,
            NEEDS_DW=needs_dw,
            NEEDS_DF=needs_df,
            NEEDS_DP=needs_dp,
            **_padded(n_in, n_out, config),
        )
    return dx, dw, df, dp
