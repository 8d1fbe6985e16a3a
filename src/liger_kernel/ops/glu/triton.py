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
def activation(x, ACTIVATION: tl.constexpr):
    """f(x) = x P(x) and f'(x) = P + x P', P the normal CDF ("gelu") or sigmoid(z(x)).

    "silu": z = x. "gelu_tanh": z = 2 sqrt(2/pi) (x + 0.044715 x^3), since (1 + tanh u) / 2 = sigmoid(2 u).
    sigmoid' is P Q with Q = exp(-z) P; 1 - P for Q cancels (fp32 gelu_tanh: 10 times the error, twice that of torch).
    """
    if ACTIVATION == "gelu":
        p = 0.5 + 0.5 * tl.erf(x * 0.7071067811865476)
        slope = p + x * tl.exp(-0.5 * x * x) * 0.3989422804014327
    else:
        z = x
        dz = 1.0
        if ACTIVATION == "gelu_tanh":
            z = 1.5957691216057308 * (x + 0.044715 * x * x * x)
            dz = 1.5957691216057308 * (1.0 + 0.134145 * x * x)
        e = tl.exp(tl.minimum(-z, 80.0))  # finite, so that e p stays a number
        p = 1.0 / (1.0 + e)
        slope = p + x * p * (e * p) * dz
    return x * p, slope


@triton.jit
def _tile(n_rows, n_cols, ROWS: tl.constexpr, COLS: tl.constexpr):
    """Rows (ROWS, 1) as int64, columns (1, COLS) and the mask of this program's tile; tiles go along the row first."""
    col_tiles = tl.cdiv(n_cols, COLS)
    pid = tl.program_id(0)
    rows = (pid // col_tiles).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    cols = (pid % col_tiles) * COLS + tl.arange(0, COLS)[None, :]
    return rows, cols, (rows < n_rows) & (cols < n_cols)


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
    ACTIVATION: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """y = f(gate gate_multiplier) up down_multiplier, f rounded before the products. One program owns one tile."""
    rows, cols, mask = _tile(n_rows, n_cols, ROWS, COLS)
    dtype = y_ptr.dtype.element_ty
    gate = tl.load(gate_ptr + rows * gate_stride + cols, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + rows * up_stride + cols, mask=mask, other=0.0).to(tl.float32)
    value, _ = activation(gate * gate_multiplier, ACTIVATION)
    y = value.to(dtype).to(tl.float32) * up * down_multiplier
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
    NEEDS_DGATE: tl.constexpr,
    NEEDS_DUP: tl.constexpr,
    WRITE_Y: tl.constexpr,
    ACTIVATION: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """With d = dy down_multiplier: dup = d f(gate gate_multiplier), f rounded as in the forward, and
    dgate = d up f'(gate gate_multiplier) gate_multiplier. With WRITE_Y, y takes the place of dy. A program owns a tile.
    """
    rows, cols, mask = _tile(n_rows, n_cols, ROWS, COLS)
    dtype = gate_ptr.dtype.element_ty
    gate = tl.load(gate_ptr + rows * gate_stride + cols, mask=mask, other=0.0).to(tl.float32)
    dy = tl.load(dy_ptr + rows * dy_stride + cols, mask=mask, other=0.0).to(tl.float32)
    dy *= down_multiplier
    value, slope = activation(gate * gate_multiplier, ACTIVATION)
    rounded = value.to(dtype).to(tl.float32)
    if NEEDS_DGATE or WRITE_Y:
        up = tl.load(up_ptr + rows * up_stride + cols, mask=mask, other=0.0).to(tl.float32)
    if NEEDS_DGATE:
        dgate = dy * up * slope * gate_multiplier
        tl.store(dgate_ptr + rows * dgate_stride + cols, dgate.to(dtype), mask=mask)
    if NEEDS_DUP:
        tl.store(dup_ptr + rows * dup_stride + cols, (dy * rounded).to(dtype), mask=mask)
    if WRITE_Y:
        y = (rounded * up * down_multiplier).to(dtype)
        tl.store(dy_ptr + rows * dy_stride + cols, y, mask=mask)


def _halves(packed: Tensor) -> tuple[Tensor, Tensor]:
    """The gate and the up half of (..., 2F), each an (R, F) view with row stride 2F."""
    gate, up = as_rows(packed).chunk(2, -1)
    return gate, up


def forward(
    gate: Tensor, up: Tensor | None, *, options: GLUOptions, needs: Needs
) -> tuple[Tensor, Saved]:
    if up is None:
        rows = as_rows(gate)
        saved: Saved = (rows, None)
        gate_rows, up_rows = _halves(rows)
    else:
        gate_rows, up_rows = as_rows(gate), as_rows(up)  # (R, F)
        saved = (gate_rows, up_rows if needs[0] else None)
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
            **flags,
            ACTIVATION=options.activation,
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
        gate, up = _halves(gate)
        dgate, dup = _halves(found[0])
    else:
        dgate, dup = (None if t is None else as_rows(t) for t in found)
    tensors = (dy, gate, up, dgate, dup)
    strides = (0 if t is None else t.stride(0) for t in tensors)
    flags = {"NEEDS_DGATE": needs_dgate, "NEEDS_DUP": needs_dup, "WRITE_Y": write_y}
    _launch(_glu_bwd, (*tensors, *strides), n_rows, n_cols, options, **flags)
    return found
