"""Sums over the rows of an expert: gradients of weights and of biases."""

from __future__ import annotations

import triton
import triton.language as tl

from liger_kernel.ops.fused_moe.products.tiles import clipped, dot


@triton.jit
def _rows_below(
    a_ptr,
    b_ptr,
    row,
    token,
    end,
    a_cols,
    b_cols,
    a_at,
    b_at,
    GATHERED_A: tl.constexpr,
    GATHERED_B: tl.constexpr,
):
    """Rows of a and b, or of tokens; zero from `end` on."""
    live = (row < end)[:, None]
    a_row = (token if GATHERED_A else row).to(tl.int64)
    b_row = (token if GATHERED_B else row).to(tl.int64)
    a = tl.load(a_ptr + a_row[:, None] * a_cols + a_at, mask=live, other=0.0)
    b = tl.load(b_ptr + b_row[:, None] * b_cols + b_at, mask=live, other=0.0)
    return a, b


@triton.jit
def weight_gradient(
    a_ptr,
    a_desc,
    b_ptr,
    b_desc,
    out_ptr,
    tokens_ptr,
    starts_ptr,
    a_cols,
    b_cols,
    GATHERED_A: tl.constexpr,
    GATHERED_B: tl.constexpr,
    A_DESC: tl.constexpr,
    B_DESC: tl.constexpr,
    ALIGNED: tl.constexpr,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    INNER: tl.constexpr,
    GROUP: tl.constexpr,
):
    """out[e] = sum over the rows p of expert e of a[p]^T b[p]. A program owns (ROWS, COLS) of one expert's; GROUP
    tiles of rows, and columns tile by tile, are worked at a time. A_DESC, B_DESC: the copy engine reads the sorted rows
    of whole steps, which need no mask then."""
    pid = tl.program_id(0)
    col_tiles = tl.cdiv(b_cols, COLS)
    row_tiles = tl.cdiv(a_cols, ROWS)
    expert = (pid // (row_tiles * col_tiles)).to(tl.int64)
    within = pid % (row_tiles * col_tiles)
    first = within // (GROUP * col_tiles) * GROUP
    size = tl.minimum(row_tiles - first, GROUP)
    within = within % (GROUP * col_tiles)
    first_row = (first + within % size) * ROWS
    first_col = within // size * COLS
    rows = first_row + tl.arange(0, ROWS)
    cols = first_col + tl.arange(0, COLS)
    a_at = clipped(rows, a_cols, ALIGNED)[None, :]
    b_at = clipped(cols, b_cols, ALIGNED)[None, :]
    start = tl.load(starts_ptr + expert)
    end = tl.load(starts_ptr + expert + 1)
    acc = tl.zeros((ROWS, COLS), tl.float32)
    step = tl.arange(0, INNER)
    row = start + step
    token = row
    if GATHERED_A or GATHERED_B:
        token = tl.load(tokens_ptr + row, mask=row < end, other=0)
    if A_DESC or B_DESC:
        whole = start + (end - start) // INNER * INNER
        for at in range(start, whole, INNER):
            if A_DESC:
                a = a_desc.load([at, first_row])
            else:
                a_row = (token if GATHERED_A else at + step).to(tl.int64)
                a = tl.load(a_ptr + a_row[:, None] * a_cols + a_at)
            if B_DESC:
                b = b_desc.load([at, first_col])
            else:
                b_row = (token if GATHERED_B else at + step).to(tl.int64)
                b = tl.load(b_ptr + b_row[:, None] * b_cols + b_at)
            if GATHERED_A or GATHERED_B:
                row = at + INNER + step
                token = tl.load(tokens_ptr + row, mask=row < end, other=0)
            acc = dot(tl.trans(a), b, acc, PRECISION)
        if whole < end:
            row = whole + step
            a, b = _rows_below(
                a_ptr, b_ptr, row, token, end, a_cols, b_cols, a_at, b_at, GATHERED_A, GATHERED_B
            )
            acc = dot(tl.trans(a), b, acc, PRECISION)
    else:
        for _ in range(start, end, INNER):
            a, b = _rows_below(
                a_ptr, b_ptr, row, token, end, a_cols, b_cols, a_at, b_at, GATHERED_A, GATHERED_B
            )
            row += INNER
            token = row
            # a step ahead: the compiler has as many steps of a and b under way as it is told
            if GATHERED_A or GATHERED_B:
                token = tl.load(tokens_ptr + row, mask=row < end, other=0)
            acc = dot(tl.trans(a), b, acc, PRECISION)
    out_ptrs = out_ptr + (expert * a_cols + rows[:, None]) * b_cols + cols[None, :]
    mask = (rows < a_cols)[:, None] & (cols < b_cols)[None, :]
    tl.store(out_ptrs, acc.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def bias_gradient(
    a_ptr,
    weights_ptr,
    out_ptr,
    slots_ptr,
    tokens_ptr,
    starts_ptr,
    n_cols,
    GATHERED: tl.constexpr,
    WEIGHTED: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """out[e] = sum over the rows p of expert e of weights[slot of p] a[p]. A program owns COLS columns of one sum."""
    col_tiles = tl.cdiv(n_cols, COLS)
    expert = (tl.program_id(0) // col_tiles).to(tl.int64)
    cols = tl.program_id(0) % col_tiles * COLS + tl.arange(0, COLS)
    start = tl.load(starts_ptr + expert)
    end = tl.load(starts_ptr + expert + 1)
    total = tl.zeros((ROWS, COLS), tl.float32)
    for at in range(start, end, ROWS):
        row = at + tl.arange(0, ROWS).to(tl.int64)
        live = row < end
        source = row
        if GATHERED:
            source = tl.load(tokens_ptr + row, mask=live, other=0).to(tl.int64)
        mask = live[:, None] & (cols < n_cols)[None, :]
        a = tl.load(a_ptr + source[:, None] * n_cols + cols[None, :], mask=mask, other=0.0)
        a = a.to(tl.float32)
        if WEIGHTED:
            slot = tl.load(slots_ptr + row, mask=live, other=0)
            a *= tl.load(weights_ptr + slot, mask=live, other=0.0).to(tl.float32)[:, None]
        total += a
    tl.store(out_ptr + expert * n_cols + cols, tl.sum(total, 0), mask=cols < n_cols)
