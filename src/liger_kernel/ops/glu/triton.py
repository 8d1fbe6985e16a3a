"""Gated activation kernels. Forward moves 3 n elements (gate and up in, y out), backward 5 n (3 in, 2 out)."""

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
from liger_kernel.backends.kernels import launch
from liger_kernel.ops.glu.contract import GLUOptions


@dataclass(frozen=True)
class Config:
    """One program owns a tile of (rows, cols), 4096 elements."""

    rows: int
    cols: int
    warps: int

    @staticmethod
    @functools.cache
    def of(n_cols: int) -> Config:
        cols = min(next_power_of_2(n_cols), 1024)  # most intermediate sizes are multiples of 512
        return Config(rows=4096 // cols, cols=cols, warps=8)

    def programs(self, n_rows: int, n_cols: int) -> int:
        return cdiv(n_rows, self.rows) * cdiv(n_cols, self.cols)


@triton.jit
def activation(x, alpha, ACTIVATION: tl.constexpr):
    """f(x) = x P(x) and f'(x) = P + x P', P the normal CDF ("gelu") or sigmoid(z(x)).

    "silu", "silu_oai", "silu_step": z = alpha x.
    "gelu_tanh": z = 2 sqrt(2/pi) (x + 0.044715 x^3), since (1 + tanh u) / 2 = sigmoid(2 u).
    sigmoid' is P Q with Q = exp(-z) P; 1 - P for Q cancels (fp32 gelu_tanh: 10 times the error, twice that of torch).
    """
    if ACTIVATION == "gelu":
        p = 0.5 + 0.5 * tl.erf(x * 0.7071067811865476)
        slope = p + x * tl.exp(-0.5 * x * x) * 0.3989422804014327
    else:
        if ACTIVATION != "gelu_tanh":
            z = alpha * x
            dz = alpha
        else:
            z = 1.5957691216057308 * (x + 0.044715 * x * x * x)
            dz = 1.5957691216057308 * (1.0 + 0.134145 * x * x)
        e = tl.exp(tl.minimum(-z, 80.0))  # finite, so that e p stays a number
        p = 1.0 / (1.0 + e)
        slope = p + x * p * (e * p) * dz
    return x * p, slope


@triton.jit
def gated(
    gate,
    up,
    limit,
    alpha,
    DTYPE: tl.constexpr,
    ACTIVATION: tl.constexpr,
    LIMITED: tl.constexpr,
):
    """Of fp32 tiles: f(gate) rounded to DTYPE, f'(gate), and the factor that f is multiplied by, which is up or up + 1.

    Limited, the gate ("silu_step": f) is at most `limit`, up within +-limit, and f' 0 beyond; the
    derivative by up is the caller's to mask by `tl.abs(up) <= limit`. A NaN is not greater than a limit, and stays.
    """
    x = gate
    if LIMITED and ACTIVATION != "silu_step":
        x = tl.where(gate > limit, limit, gate)
    exact, slope = activation(x, alpha, ACTIVATION)
    value = exact.to(DTYPE).to(tl.float32)
    if LIMITED:
        bounded = gate
        if ACTIVATION == "silu_step":
            bounded = exact
            value = tl.where(value > limit, limit, value)
        slope = tl.where(bounded <= limit, slope, 0.0)
        up = tl.where(up > limit, limit, tl.where(up < -limit, -limit, up))
    if ACTIVATION == "silu_oai":
        up += 1.0
    return value, slope, up


@triton.jit
def _tile(n_rows, n_cols, ROWS: tl.constexpr, COLS: tl.constexpr):
    """Rows (ROWS, 1) as int64, columns (1, COLS) and the mask of this program's tile; tiles go along the row first."""
    col_tiles = tl.cdiv(n_cols, COLS)
    pid = tl.program_id(0)
    rows = (pid // col_tiles).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    cols = (pid % col_tiles) * COLS + tl.arange(0, COLS)[None, :]
    return rows, cols, (rows < n_rows) & (cols < n_cols)


@triton.jit
def _load(ptr, stride, n_rows, n_cols, ROWS: tl.constexpr, COLS: tl.constexpr):
    rows, cols, mask = _tile(n_rows, n_cols, ROWS, COLS)
    return tl.load(ptr + rows * stride + cols, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _load_both(
    gate_ptr,
    up_ptr,
    gate_stride,
    up_stride,
    n_rows,
    n_cols,
    INTERLEAVED: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """The tiles of gate and up. Where they alternate, a tile twice as wide, which begins at gate_ptr."""
    if INTERLEAVED:
        pairs = _load(gate_ptr, gate_stride, n_rows, 2 * n_cols, ROWS, 2 * COLS)
        gate, up = tl.split(tl.reshape(pairs, (ROWS, COLS, 2)))
    else:
        gate = _load(gate_ptr, gate_stride, n_rows, n_cols, ROWS, COLS)
        up = _load(up_ptr, up_stride, n_rows, n_cols, ROWS, COLS)
    return gate, up


@triton.jit
def _glu_fwd(
    gate_ptr,
    up_ptr,
    y_ptr,
    gate_stride,
    up_stride,
    n_rows,
    n_cols,
    gate_multiplier,
    down_multiplier,
    limit,
    alpha,
    ACTIVATION: tl.constexpr,
    LIMITED: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """y = f(gate gate_multiplier) up down_multiplier, f rounded before the products. One program owns one tile."""
    rows, cols, mask = _tile(n_rows, n_cols, ROWS, COLS)
    dtype = y_ptr.dtype.element_ty
    gate, up = _load_both(
        gate_ptr, up_ptr, gate_stride, up_stride, n_rows, n_cols, INTERLEAVED, ROWS, COLS
    )
    value, _, factor = gated(gate * gate_multiplier, up, limit, alpha, dtype, ACTIVATION, LIMITED)
    y = value * factor * down_multiplier
    tl.store(y_ptr + rows * n_cols + cols, y.to(dtype), mask=mask)


@triton.jit
def _glu_bwd(
    dy_ptr,
    gate_ptr,
    up_ptr,
    dgate_ptr,
    dup_ptr,
    dy_stride,
    gate_stride,
    up_stride,
    dgate_stride,
    dup_stride,
    n_rows,
    n_cols,
    gate_multiplier,
    down_multiplier,
    limit,
    alpha,
    NEEDS_DGATE: tl.constexpr,
    NEEDS_DUP: tl.constexpr,
    WRITE_Y: tl.constexpr,
    ACTIVATION: tl.constexpr,
    LIMITED: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """With d = dy down_multiplier: dup = d f(gate gate_multiplier), f rounded as in the forward, and
    dgate = d up f'(gate gate_multiplier) gate_multiplier. With WRITE_Y, y takes the place of dy. A program owns a tile.
    """
    rows, cols, mask = _tile(n_rows, n_cols, ROWS, COLS)
    dtype = gate_ptr.dtype.element_ty
    if NEEDS_DGATE or WRITE_Y or LIMITED:
        gate, up = _load_both(
            gate_ptr, up_ptr, gate_stride, up_stride, n_rows, n_cols, INTERLEAVED, ROWS, COLS
        )
    else:
        gate = _load(gate_ptr, gate_stride, n_rows, n_cols, ROWS, COLS)
        up = gate
    dy = _load(dy_ptr, dy_stride, n_rows, n_cols, ROWS, COLS) * down_multiplier
    value, slope, factor = gated(
        gate * gate_multiplier, up, limit, alpha, dtype, ACTIVATION, LIMITED
    )
    dgate = (dy * factor * slope * gate_multiplier).to(dtype)
    dup = dy * value
    if LIMITED:
        dup = tl.where(tl.abs(up) <= limit, dup, 0.0)
    if INTERLEAVED:
        pairs = tl.reshape(tl.join(dgate, dup.to(dtype)), (ROWS, 2 * COLS))
        _, both, inside = _tile(n_rows, 2 * n_cols, ROWS, 2 * COLS)
        tl.store(dgate_ptr + rows * dgate_stride + both, pairs, mask=inside)
    else:
        if NEEDS_DGATE:
            tl.store(dgate_ptr + rows * dgate_stride + cols, dgate, mask=mask)
        if NEEDS_DUP:
            tl.store(dup_ptr + rows * dup_stride + cols, dup.to(dtype), mask=mask)
    if WRITE_Y:
        y = (value * factor * down_multiplier).to(dtype)
        tl.store(dy_ptr + rows * dy_stride + cols, y, mask=mask)


def _halves(packed: Tensor, options: GLUOptions) -> tuple[Tensor, Tensor]:
    """Gate and up of (..., 2F), each an (R, F) view with row stride 2F."""
    rows = as_rows(packed)
    if options.interleaved:
        return rows[:, ::2], rows[:, 1::2]
    gate, up = rows.chunk(2, -1)
    return gate, up


def forward(
    gate: Tensor, up: Tensor | None, *, options: GLUOptions, needs: Needs
) -> tuple[Tensor, Saved]:
    if up is None:
        rows = as_rows(gate)
        saved: Saved = (rows, None)
        gate_rows, up_rows = _halves(rows, options)
    else:
        gate_rows, up_rows = as_rows(gate), as_rows(up)  # (R, F)
        needs_up = needs[0] or options.limit is not None
        saved = (gate_rows, up_rows if needs_up else None)
    n_rows, n_cols = gate_rows.shape
    y = gate.new_empty(*gate.shape[:-1], n_cols)
    strides = (gate_rows.stride(0), up_rows.stride(0))
    _launch(_glu_fwd, (gate_rows, up_rows, y, *strides), n_rows, n_cols, options)
    return y, saved


def _launch(
    kernel: Any, args: tuple[Any, ...], n_rows: int, n_cols: int, options: GLUOptions, **flags: bool
) -> None:
    config = Config.of(n_cols)
    if n_rows:
        launch(
            kernel,
            (config.programs(n_rows, n_cols),),
            *args,
            n_rows,
            n_cols,
            options.gate_multiplier,
            options.down_multiplier,
            0.0 if options.limit is None else options.limit,
            options.alpha,
            **flags,
            ACTIVATION=options.activation,
            LIMITED=options.limit is not None,
            INTERLEAVED=options.interleaved,
            ROWS=config.rows,
            COLS=config.cols,
            num_warps=config.warps,
        )


def backward(grads: Grads, saved: Saved, *, options: GLUOptions, needs: Needs) -> Grads:
    return _backward(as_rows(grads[0]), grads[0].shape, saved, options, needs, write_y=False)


def backward_with_output(
    dy: Tensor, saved: Saved, *, options: GLUOptions, needs: Needs, into: Grads | None = None
) -> tuple[Grads, Tensor]:
    """The gradients, and the output of the forward in the memory of dy (R, F), whose rows have unit stride.

    The gradients take the memory of `into`, which may be `saved`: every element is read before it is written.
    """
    return _backward(dy, dy.shape, saved, options, needs, write_y=True, into=into), dy


def _backward(
    dy: Tensor,
    shape: torch.Size,
    saved: Saved,
    options: GLUOptions,
    needs: Needs,
    write_y: bool,
    into: Grads | None = None,
) -> Grads:
    gate, up = saved
    needs_dgate, needs_dup = needs
    n_rows, n_cols = dy.shape
    packed = needs_dgate and up is None
    if into is None:
        shapes = ((*shape[:-1], 2 * n_cols) if packed else shape, shape)
        into = [gate.new_empty(s) if need else None for s, need in zip(shapes, needs, strict=True)]
    found = tuple(t if need else None for t, need in zip(into, needs, strict=True))
    if packed:  # one gradient, written in halves
        needs_dup = True
        gate, up = _halves(gate, options)
        dgate, dup = _halves(found[0], options)
    else:
        dgate, dup = (None if t is None else as_rows(t) for t in found)
    tensors = (dy, gate, up, dgate, dup)
    strides = (0 if t is None else t.stride(0) for t in tensors)
    flags = {"NEEDS_DGATE": needs_dgate, "NEEDS_DUP": needs_dup, "WRITE_Y": write_y}
    _launch(_glu_bwd, (*tensors, *strides), n_rows, n_cols, options, **flags)
    return found
