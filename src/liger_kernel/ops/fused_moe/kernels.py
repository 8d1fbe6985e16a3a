"""Kernels of a mixture of experts: grouped matrix products over rows sorted by expert, and what stands between them."""

from __future__ import annotations

import triton
import triton.language as tl

from liger_kernel.ops.glu.triton import activation


@triton.jit
def activation_of(
    gate,
    up,
    limit,
    alpha,
    up_shift,
    ACTIVATION: tl.constexpr,
    GATED: tl.constexpr,
    LIMITED: tl.constexpr,
):
    """f(alpha gate) / alpha and its derivative, up + up_shift, and whether gate and up are within the limit. Without a
    gate the factor is 1."""
    gate = gate.to(tl.float32)
    gate_in = (
        tl.zeros(gate.shape, tl.int32) == 0
    )  # Triton 3.2's interpreter knows no int1, and no ~ of one
    up_in = gate_in
    if LIMITED:  # a NaN stays one
        gate_in = (gate <= limit) | (gate != gate)
        gate = tl.where(gate_in, gate, limit)
    z = gate * alpha
    if ACTIVATION == "relu_squared":
        z = tl.where(z < 0.0, 0.0, z)
        value = z * z
        slope = 2.0 * z
    else:
        value, slope = activation(z, 1.0, ACTIVATION)
    factor = tl.zeros_like(gate) + 1.0
    if GATED:
        up = up.to(tl.float32)
        if LIMITED:
            up_in = (tl.abs(up) <= limit) | (up != up)
            up = tl.where(up > limit, limit, tl.where(up < -limit, -limit, up))
        factor = up + up_shift
    return value / alpha, slope, factor, gate_in, up_in


@triton.jit
def places(rows, cols, n_cols, GATED: tl.constexpr, INTERLEAVED: tl.constexpr):
    """Where gate and up of an activation (rows, cols) of n_cols columns lie."""
    gate_at = rows * n_cols + cols
    up_at = gate_at
    if GATED:
        gate_at = rows * (2 * n_cols) + cols
        up_at = gate_at + n_cols
        if INTERLEAVED:
            gate_at = rows * (2 * n_cols) + 2 * cols
            up_at = gate_at + 1
    return gate_at, up_at


@triton.jit
def _gate_and_up(
    hidden_ptr,
    rows,
    cols,
    mask,
    n_cols,
    limit,
    alpha,
    up_shift,
    ACTIVATION: tl.constexpr,
    GATED: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    LIMITED: tl.constexpr,
):
    """`activation_of` of what is loaded, and where gate and up are."""
    gate_at, up_at = places(rows, cols, n_cols, GATED, INTERLEAVED)
    gate = tl.load(hidden_ptr + gate_at, mask=mask, other=0.0)
    up = gate
    if GATED:
        up = tl.load(hidden_ptr + up_at, mask=mask, other=0.0)
    value, slope, factor, gate_in, up_in = activation_of(
        gate, up, limit, alpha, up_shift, ACTIVATION, GATED, LIMITED
    )
    return value, slope, factor, gate_in, up_in, gate_at, up_at


@triton.jit
def activate(
    hidden_ptr,
    act_ptr,
    live_ptr,
    n_cols,
    limit,
    alpha,
    up_shift,
    ACTIVATION: tl.constexpr,
    GATED: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    LIMITED: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """act = f(alpha gate) / alpha (up + up_shift), rounded once. One program owns one tile."""
    col_tiles = tl.cdiv(n_cols, COLS)
    rows = (tl.program_id(0) // col_tiles).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    cols = tl.program_id(0) % col_tiles * COLS + tl.arange(0, COLS)[None, :]
    mask = (rows < tl.load(live_ptr)) & (cols < n_cols)
    value, _, factor, _, _, _, _ = _gate_and_up(
        hidden_ptr,
        rows,
        cols,
        mask,
        n_cols,
        limit,
        alpha,
        up_shift,
        ACTIVATION,
        GATED,
        INTERLEAVED,
        LIMITED,
    )
    act = (value * factor).to(act_ptr.dtype.element_ty)
    tl.store(act_ptr + rows * n_cols + cols, act, mask=mask)


@triton.jit
def activate_bwd(
    da_ptr,
    hidden_ptr,
    weights_ptr,
    slots_ptr,
    dhidden_ptr,
    act_ptr,
    dw_ptr,
    live_ptr,
    n_cols,
    limit,
    alpha,
    up_shift,
    NEEDS_DH: tl.constexpr,
    NEEDS_ACT: tl.constexpr,
    NEEDS_DW: tl.constexpr,
    ACTIVATION: tl.constexpr,
    GATED: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    LIMITED: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """dgate = w da (up + up_shift) f', dup = w da f, w act, which may lie where da did, and dw = sum da act, at the
    slot of the row. A program owns ROWS rows."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    live = row < tl.load(live_ptr)
    slot = tl.load(slots_ptr + row, mask=live, other=0)
    w = tl.load(weights_ptr + slot, mask=live, other=0.0).to(tl.float32)[:, None]
    rows = row[:, None]
    dw = tl.zeros((ROWS, COLS), tl.float32)
    dtype = hidden_ptr.dtype.element_ty
    for start in range(0, n_cols, COLS):
        cols = start + tl.arange(0, COLS)[None, :]
        mask = live[:, None] & (cols < n_cols)
        value, slope, factor, gate_in, up_in, gate_at, up_at = _gate_and_up(
            hidden_ptr,
            rows,
            cols,
            mask,
            n_cols,
            limit,
            alpha,
            up_shift,
            ACTIVATION,
            GATED,
            INTERLEAVED,
            LIMITED,
        )
        da = tl.load(da_ptr + rows * n_cols + cols, mask=mask, other=0.0).to(tl.float32)
        act = value * factor
        if NEEDS_DW:
            dw += tl.where(mask, da * act, 0.0)
        if NEEDS_DH:
            dgate = tl.where(gate_in, w * da * factor * slope, 0.0)
            tl.store(dhidden_ptr + gate_at, dgate.to(dtype), mask=mask)
            if GATED:
                dup = tl.where(up_in, w * da * value, 0.0)
                tl.store(dhidden_ptr + up_at, dup.to(dtype), mask=mask)
        if NEEDS_ACT:
            tl.store(act_ptr + rows * n_cols + cols, (w * act).to(dtype), mask=mask)
    if NEEDS_DW:
        tl.store(dw_ptr + slot, tl.sum(dw, 1), mask=live)


@triton.jit
def combine(
    y_ptr,
    weights_ptr,
    rows_ptr,
    live_ptr,
    out_ptr,
    n_tokens,
    n_cols,
    TOP_K: tl.constexpr,
    WEIGHTED: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """out[t] = sum_k weights[t, k] y[row of (t, k)], without the pairs of no expert. One program owns one tile."""
    col_tiles = tl.cdiv(n_cols, COLS)
    token = (tl.program_id(0) // col_tiles).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    cols = tl.program_id(0) % col_tiles * COLS + tl.arange(0, COLS)[None, :]
    inside = token < n_tokens
    n_live = tl.load(live_ptr)
    total = tl.zeros((ROWS, COLS), tl.float32)
    for k in tl.static_range(TOP_K):
        row = tl.load(rows_ptr + token * TOP_K + k, mask=inside, other=0)
        live = inside & (row < n_live)
        mask = live[:, None] & (cols < n_cols)
        y = tl.load(y_ptr + row.to(tl.int64)[:, None] * n_cols + cols, mask=mask, other=0.0)
        y = y.to(tl.float32)
        if WEIGHTED:
            y *= tl.load(weights_ptr + token * TOP_K + k, mask=live, other=0.0).to(tl.float32)[
                :, None
            ]
        total += y
    mask = inside[:, None] & (cols < n_cols)
    out_ptrs = out_ptr + token[:, None] * n_cols + cols
    tl.store(out_ptrs, total.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def spread(
    x_ptr,
    rows_ptr,
    out_ptr,
    n_tokens,
    n_cols,
    TOP_K: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """out[row of (t, k)] = x[t]. One program owns one tile of x, which it reads once."""
    col_tiles = tl.cdiv(n_cols, COLS)
    token = (tl.program_id(0) // col_tiles).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    cols = tl.program_id(0) % col_tiles * COLS + tl.arange(0, COLS)[None, :]
    inside = token < n_tokens
    mask = inside[:, None] & (cols < n_cols)
    x = tl.load(x_ptr + token[:, None] * n_cols + cols, mask=mask)
    for k in tl.static_range(TOP_K):
        row = tl.load(rows_ptr + token * TOP_K + k, mask=inside, other=0).to(tl.int64)
        tl.store(out_ptr + row[:, None] * n_cols + cols, x, mask=mask)


@triton.jit
def relaid(
    source_ptr,
    out_ptr,
    n_rows,
    n_cols,
    source_row_stride,
    source_col_stride,
    out_row_stride,
    out_col_stride,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """out = source, of other strides. One program owns one tile."""
    col_tiles = tl.cdiv(n_cols, COLS)
    rows = (tl.program_id(0) // col_tiles).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    cols = (tl.program_id(0) % col_tiles).to(tl.int64) * COLS + tl.arange(0, COLS)[None, :]
    mask = (rows < n_rows) & (cols < n_cols)
    source = source_ptr + rows * source_row_stride + cols * source_col_stride
    found = tl.load(source, mask=mask).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + rows * out_row_stride + cols * out_col_stride, found, mask=mask)
