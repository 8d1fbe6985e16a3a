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
    """COLS columns of all streams of a token at a time.

    Forward holds all streams of its columns. Backward goes through pairs of streams, which it reads again from the L1
    cache; with one warp the sums of a pair take no barrier. On an H100, 8192 x 4 x 4096: 0.38 ms, 0.40 with two to
    eight warps, 1.46 with all pairs in registers, whose layouts had to change; bandwidth alone would allow 0.31.
    """

    cols: int
    warps: int = 4

    @staticmethod
    @functools.cache
    def forward(n_cols: int, streams: int) -> Config:
        of_thread = 1 << (max(1, min(8, 64 // streams)).bit_length() - 1)
        cols = min(128 * of_thread, max(32, next_power_of_2(n_cols)))
        return Config(cols, warps=4 if streams <= 128 else 8)

    @staticmethod
    @functools.cache
    def backward(n_cols: int) -> Config:
        return Config(min(512, max(32, next_power_of_2(n_cols))), warps=1)


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
    """(IN, OUT) of a token in fp32."""
    i, o = tl.arange(0, IN)[:, None], tl.arange(0, OUT)[None, :]
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
    # over the first dimension: Triton makes the product (OUT, IN, 1) (1, IN, COLS) a `tl.dot`, in tf32
    y = tl.sum(w[:, :, None] * x[:, None, :], 0)  # (OUT, COLS)
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
    NEEDS_DX: tl.constexpr,
    NEEDS_DW: tl.constexpr,
    NEEDS_DF: tl.constexpr,
    NEEDS_DP: tl.constexpr,
    N_OUT: tl.constexpr,
    IN: tl.constexpr,
    OUT: tl.constexpr,
    COLS: tl.constexpr,
):
    """dx[i] = sum_o w[o, i] dy[o], df = sum_o p[o] dy[o]; over the columns dw[o, i] = sum of dy[o] x[i], dp[o] = sum of
    dy[o] f. One program owns one token."""
    row = tl.program_id(0).to(tl.int64)
    o_all, i_all = tl.arange(0, OUT), tl.arange(0, IN)
    dw = tl.zeros((OUT, IN), tl.float32)
    dp = tl.zeros((OUT,), tl.float32)
    w_ptr += row * N_OUT * n_in
    for start in range(0, n_cols, COLS):
        cols = start + tl.arange(0, COLS)
        mask = cols < n_cols
        dy_at = dy_ptr + row * dy_row + cols
        if NEEDS_DX or NEEDS_DW:
            for i in range(0, n_in):
                if NEEDS_DW:
                    at = x_ptr + row * x_row + tl.cast(i, tl.int64) * x_stream + cols
                    x = tl.load(at, mask=mask, other=0.0).to(tl.float32)
                dx = tl.zeros((COLS,), tl.float32)
                for o in tl.static_range(N_OUT):
                    at = dy_at + tl.cast(o, tl.int64) * dy_stream
                    dy = tl.load(at, mask=mask, other=0.0).to(tl.float32)
                    if NEEDS_DX:
                        dx += tl.load(w_ptr + o * n_in + i).to(tl.float32) * dy
                    if NEEDS_DW:
                        is_here = (o_all == o)[:, None] & (i_all == i)[None, :]
                        dw += tl.where(is_here, tl.sum(dy * x, 0), 0.0)
                if NEEDS_DX:
                    at = dx_ptr + (row * n_in + i) * n_cols + cols
                    tl.store(at, dx.to(dx_ptr.dtype.element_ty), mask=mask)
        if NEEDS_DF or NEEDS_DP:
            if NEEDS_DP:
                f = tl.load(f_ptr + row * f_row + cols, mask=mask, other=0.0).to(tl.float32)
            df = tl.zeros((COLS,), tl.float32)
            for o in tl.static_range(N_OUT):
                at = dy_at + tl.cast(o, tl.int64) * dy_stream
                dy = tl.load(at, mask=mask, other=0.0).to(tl.float32)
                if NEEDS_DF:
                    df += tl.load(p_ptr + row * N_OUT + o).to(tl.float32) * dy
                if NEEDS_DP:
                    dp += tl.where(o_all == o, tl.sum(dy * f, 0), 0.0)
            if NEEDS_DF:
                at = df_ptr + row * n_cols + cols
                tl.store(at, df.to(df_ptr.dtype.element_ty), mask=mask)
    if NEEDS_DW:
        at = dw_ptr + (row * N_OUT + o_all[:, None]) * n_in + i_all[None, :]
        here = (o_all < N_OUT)[:, None] & (i_all < n_in)[None, :]
        tl.store(at, dw.to(dw_ptr.dtype.element_ty), mask=here)
    if NEEDS_DP:
        at = dp_ptr + row * N_OUT + o_all
        tl.store(at, dp.to(dp_ptr.dtype.element_ty), mask=o_all < N_OUT)


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
    config = Config.forward(n_cols, max(n_in, n_out))
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
    config = Config.backward(n_cols)
    x_row, x_stream = (0, 0) if x is None else x.stride()[:2]
    if n_rows and n_cols:
        launch(
            _mhc_mix_bwd,
            (n_rows,),
            *(dy, x, w, f, p, dx, dw, df, dp, *dy.stride()[:2], x_row, x_stream),
            *(0 if f is None else f.stride(0), n_cols, n_in),
            NEEDS_DX=needs_dx,
            NEEDS_DW=needs_dw,
            NEEDS_DF=needs_df,
            NEEDS_DP=needs_dp,
            N_OUT=n_out,
            **_padded(n_in, n_out, config),
        )
    return dx, dw, df, dp
