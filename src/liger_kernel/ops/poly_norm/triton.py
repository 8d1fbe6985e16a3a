"""PolyNorm kernels. Forward moves 2 n elements (x in, y out), backward 3 n (dy and x in, dx out).

With u = n(x) = x r1, n(x^p) = u^p r_p where r_p = 1 / sqrt(mean(u^2p) + eps r1^2p): the same number, and no power of x
overflows. A row that does not fit the registers is read again for each sum, and once from its end to be written.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from liger_kernel._core.contract import Grads, Needs, Saved
from liger_kernel._core.shapes import as_rows, cdiv
from liger_kernel.backends import facts_of
from liger_kernel.backends.kernels import RowTile
from liger_kernel.ops.poly_norm.contract import PolyNormOptions

#: as for softmax: one row in forward, two in backward
FORWARD = {"elements": 2048, "longest": 16384, "walked": 8192, "per_thread": 32}
BACKWARD = {**FORWARD, "walked_per_thread": 16}  # 32 spill 0.5 KB


@triton.jit
def _weights(w_ptr):
    """Those of the third, the second and the first power."""
    w3 = tl.load(w_ptr).to(tl.float32)
    w2 = tl.load(w_ptr + 1).to(tl.float32)
    w1 = tl.load(w_ptr + 2).to(tl.float32)
    return w3, w2, w1


@triton.jit
def _poly_norm_fwd(
    x_ptr,
    w_ptr,
    b_ptr,
    y_ptr,
    rstd_ptr,
    x_stride,
    n_rows,
    n_cols,
    eps,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    LOOPED: tl.constexpr,
):
    """y = w3 u^3 r3 + w2 u^2 r2 + w1 u + b. One program owns ROWS rows, and row by row r3, r2 and r1 in rstd_ptr."""
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    row_mask = (rows < n_rows)[:, None]
    cols = tl.arange(0, BLOCK)[None, :]
    x_at = x_ptr + (rows * x_stride)[:, None] + cols
    y_at = y_ptr + (rows * n_cols)[:, None] + cols
    dtype = y_ptr.dtype.element_ty
    mask = row_mask & (cols < n_cols)
    first = tl.load(x_at, mask=mask, other=0.0).to(tl.float32)
    squares = first * first
    if LOOPED:
        for start in range(BLOCK, n_cols, BLOCK):
            x = tl.load(x_at + start, mask=row_mask & (start + cols < n_cols), other=0.0)
            x = x.to(tl.float32)
            squares += x * x
    r1 = tl.rsqrt(tl.sum(squares, 1) / n_cols + eps)
    first *= r1[:, None]
    v = first * first
    fourth = v * v
    sixth = fourth * v
    if LOOPED:
        for start in range(BLOCK, n_cols, BLOCK):
            x = tl.load(x_at + start, mask=row_mask & (start + cols < n_cols), other=0.0)
            u = x.to(tl.float32) * r1[:, None]
            v = u * u
            fourth += v * v
            sixth += v * v * v
    r1_squared = r1 * r1
    eps_squared = eps * r1_squared * r1_squared  # in units of u^4
    r2 = tl.rsqrt(tl.sum(fourth, 1) / n_cols + eps_squared)
    r3 = tl.rsqrt(tl.sum(sixth, 1) / n_cols + eps_squared * r1_squared)
    w3, w2, w1 = _weights(w_ptr)
    third = (w3 * r3)[:, None]
    second = (w2 * r2)[:, None]
    b = tl.load(b_ptr).to(tl.float32)
    if LOOPED:
        end = tl.cdiv(n_cols, BLOCK) * BLOCK
        for back in range(BLOCK, n_cols, BLOCK):
            start = end - back
            inside = row_mask & (start + cols < n_cols)
            x = tl.load(x_at + start, mask=inside, other=0.0, eviction_policy="evict_first")
            u = x.to(tl.float32) * r1[:, None]
            y = u * (w1 + u * (second + u * third)) + b
            tl.store(y_at + start, y.to(dtype), mask=inside)
    y = first * (w1 + first * (second + first * third)) + b
    tl.store(y_at, y.to(dtype), mask=mask)
    tl.store(rstd_ptr + rows * 3, r3, mask=rows < n_rows)
    tl.store(rstd_ptr + rows * 3 + 1, r2, mask=rows < n_rows)
    tl.store(rstd_ptr + rows * 3 + 2, r1, mask=rows < n_rows)


@triton.jit
def _poly_norm_bwd(
    dy_ptr,
    x_ptr,
    w_ptr,
    rstd_ptr,
    dx_ptr,
    partial_ptr,
    dy_stride,
    x_stride,
    n_rows,
    n_cols,
    NEEDS_DX: tl.constexpr,
    NEEDS_SUMS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    LOOPED: tl.constexpr,
):
    """dx = r1 sum over p of w_p p u^(p-1) r_p (dy - n_p mean(dy n_p)), dw_p = sum of dy n_p, db = sum of dy, with
    n_p = u^p r_p. One program owns ROWS rows, and four numbers in partial_ptr: its share of dw and db.
    """
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    row_mask = (rows < n_rows)[:, None]
    cols = tl.arange(0, BLOCK)[None, :]
    dy_at = dy_ptr + (rows * dy_stride)[:, None] + cols
    x_at = x_ptr + (rows * x_stride)[:, None] + cols
    mask = row_mask & (cols < n_cols)
    r3 = tl.load(rstd_ptr + rows * 3, mask=rows < n_rows, other=0.0)[:, None]
    r2 = tl.load(rstd_ptr + rows * 3 + 1, mask=rows < n_rows, other=0.0)[:, None]
    r1 = tl.load(rstd_ptr + rows * 3 + 2, mask=rows < n_rows, other=0.0)[:, None]
    first = tl.load(x_at, mask=mask, other=0.0).to(tl.float32) * r1
    first_dy = tl.load(dy_at, mask=mask, other=0.0).to(tl.float32)
    sum1 = first_dy * first
    sum2 = sum1 * first
    sum3 = sum2 * first
    total = first_dy
    if LOOPED:
        for start in range(BLOCK, n_cols, BLOCK):
            inside = row_mask & (start + cols < n_cols)
            u = tl.load(x_at + start, mask=inside, other=0.0).to(tl.float32) * r1
            dy = tl.load(dy_at + start, mask=inside, other=0.0).to(tl.float32)
            product = dy * u
            sum1 += product
            sum2 += product * u
            sum3 += product * u * u
            total += dy
    s1 = tl.sum(sum1, 1)[:, None]
    s2 = tl.sum(sum2, 1)[:, None] * r2
    s3 = tl.sum(sum3, 1)[:, None] * r3
    if NEEDS_SUMS:
        at = partial_ptr + tl.program_id(0).to(tl.int64) * 4
        tl.store(at, tl.sum(tl.sum(s3, 1), 0))
        tl.store(at + 1, tl.sum(tl.sum(s2, 1), 0))
        tl.store(at + 2, tl.sum(tl.sum(s1, 1), 0))
        tl.store(at + 3, tl.sum(tl.sum(total, 1), 0))
    if NEEDS_DX:
        w3, w2, w1 = _weights(w_ptr)
        third = 3.0 * w3 * r3
        second = 2.0 * w2 * r2
        # dx / r1 = dy (w1 + second u + third u^2) - (c1 u + c2 u^3 + c3 u^5)
        c1 = w1 * s1 / n_cols
        c2 = second * r2 * s2 / n_cols
        c3 = third * r3 * s3 / n_cols
        dx_at = dx_ptr + (rows * n_cols)[:, None] + cols
        dtype = dx_ptr.dtype.element_ty
        if LOOPED:
            end = tl.cdiv(n_cols, BLOCK) * BLOCK
            for back in range(BLOCK, n_cols, BLOCK):
                start = end - back
                inside = row_mask & (start + cols < n_cols)
                x = tl.load(x_at + start, mask=inside, other=0.0, eviction_policy="evict_first")
                dy = tl.load(dy_at + start, mask=inside, other=0.0, eviction_policy="evict_first")
                u = x.to(tl.float32) * r1
                v = u * u
                dx = dy.to(tl.float32) * (w1 + u * (second + u * third))
                dx -= u * (c1 + v * (c2 + v * c3))
                tl.store(dx_at + start, (r1 * dx).to(dtype), mask=inside)
        v = first * first
        dx = first_dy * (w1 + first * (second + first * third))
        dx -= first * (c1 + v * (c2 + v * c3))
        tl.store(dx_at, (r1 * dx).to(dtype), mask=mask)


def forward(
    x: Tensor, weight: Tensor, bias: Tensor, *, options: PolyNormOptions, needs: Needs
) -> tuple[Tensor, Saved]:
    if not x.numel():
        return x.new_empty(x.shape), (x, weight, bias, None)
    rows, weight = as_rows(x), weight.contiguous()
    (n_rows, n_cols), y = rows.shape, x.new_empty(x.shape)
    rstd = x.new_empty((n_rows, 3), dtype=torch.float32)
    tile = RowTile.of(n_cols, facts_of(x.device).most_warps, **FORWARD)
    arguments = (rows, weight, bias, y, rstd, rows.stride(0), n_rows, n_cols, options.eps)
    tile.launch(_poly_norm_fwd, n_rows, *arguments)
    return y, (rows, weight, bias, rstd)


def backward(grads: Grads, saved: Saved, *, options: PolyNormOptions, needs: Needs) -> Grads:
    rows, weight, bias, rstd = saved
    needs_dx, needs_dw, needs_db = needs
    dx = rows.new_empty(grads[0].shape) if needs_dx else None
    sums = rows.new_zeros(4, dtype=torch.float32)
    if rows.numel():
        (n_rows, n_cols), dy = rows.shape, as_rows(grads[0])
        tile = RowTile.of(n_cols, facts_of(rows.device).most_warps, **BACKWARD)
        partial = rows.new_empty((cdiv(n_rows, tile.rows), 4), dtype=torch.float32)
        tile.launch(
            _poly_norm_bwd,
            n_rows,
            *(dy, rows, weight, rstd, dx, partial, dy.stride(0), rows.stride(0), n_rows, n_cols),
            NEEDS_DX=needs_dx,
            NEEDS_SUMS=needs_dw or needs_db,
        )
        sums = partial.sum(0) if needs_dw or needs_db else sums
    dw = sums.to(weight.dtype)
    db = dw if bias.dtype == weight.dtype else sums.to(bias.dtype)
    return dx, dw[:3] if needs_dw else None, db[3].view(bias.shape) if needs_db else None
