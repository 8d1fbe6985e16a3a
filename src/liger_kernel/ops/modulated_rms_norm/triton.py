"""Modulated RMSNorm kernels. Forward moves 2 n elements (x in, y out), backward 3 n (dy and x in, dx out)."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from liger_kernel._core.contract import Grads, Needs, Saved
from liger_kernel._core.shapes import as_rows, cdiv, next_power_of_2
from liger_kernel.backends import facts_of
from liger_kernel.backends.kernels import RowTile, column_sums, launch
from liger_kernel.backends.records import DeviceFacts
from liger_kernel.backends.triton import INTERPRET
from liger_kernel.ops.modulated_rms_norm.contract import ModulatedRMSNormOptions

#: as for the other norms: a row that does not fit the registers is read twice
FORWARD = {
    "elements": 4096,
    "longest": 16384,
    "walked": 8192,
    "per_thread": 32,
    "walked_per_thread": 16,  # 32 spill 1.2 KB
}
STAGES = 3  # of backward
#: tile of the kernel that adds up what backward left in parts; the interpreter pays per program
_END_ROWS, _END_COLS = (64, 1024) if INTERPRET else (256, 16)


@dataclass(frozen=True)
class BackwardConfig:
    """Tiles of (rows, block) elements, `programs` of which walk over all rows; three sums of a tile fill the registers.

    Rows of more than 8192 columns spill, and are slow.
    """

    rows: int
    block: int
    warps: int
    programs: int
    stages: int

    @staticmethod
    @functools.cache
    def of(n_cols: int, shared: bool, bytes_per_column: int, facts: DeviceFacts) -> BackwardConfig:
        """`shared`: several rows of x have one of scale, and may share a tile."""
        block = next_power_of_2(n_cols)
        rows = max(1, (8192 if shared else 1) // block)
        warps = min(facts.most_warps, max(4, rows * block // (1024 if shared else 512)))
        programs = facts.processors * max(1, (8 if shared else 16) // warps)
        stages = facts.stages(STAGES, rows * block * bytes_per_column)
        return BackwardConfig(rows, block, warps, programs, stages)


@triton.jit
def _wide(at, inside):
    """What one row or a tile of pointers holds, in fp32. Triton 3.2 does not widen pointers to their mask."""
    return tl.load(tl.broadcast_to(at, inside.shape), mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _row(ptr, at, inside, otherwise, PRESENT: tl.constexpr):
    """A row of the parameters in fp32, or the number that stands for it."""
    if PRESENT:
        return _wide(ptr + at, inside)
    else:
        return tl.full(inside.shape, otherwise, tl.float32)


@triton.jit
def _modulated(
    x, rstd, w_ptr, scale_at, shift_at, cols, start, inside, offset, dtype: tl.constexpr,
    HAS_WEIGHT: tl.constexpr, HAS_SHIFT: tl.constexpr, ROUND: tl.constexpr,
):  # fmt: skip
    """x rstd (offset + w) (1 + scale) + shift, the norm rounded."""
    normed = x * rstd[:, None]
    if ROUND:
        normed = normed.to(dtype).to(tl.float32)
    if HAS_WEIGHT:
        normed *= _wide(w_ptr + start + cols, inside) + offset
    normed = normed.to(dtype).to(tl.float32)
    y = normed * (1.0 + _wide(scale_at + start, inside))
    if HAS_SHIFT:
        y += _wide(shift_at + start, inside)
    return y.to(dtype)


@triton.jit
def _modulated_rms_norm_fwd(
    x_ptr,
    w_ptr,
    scale_ptr,
    shift_ptr,
    y_ptr,
    rstd_ptr,
    x_stride,
    scale_stride,
    shift_stride,
    n_rows,
    n_cols,
    per_scale,
    eps,
    offset,
    HAS_WEIGHT: tl.constexpr,
    HAS_SHIFT: tl.constexpr,
    ROUND: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    LOOPED: tl.constexpr,
):
    """y = x rstd (offset + w) (1 + scale) + shift, rstd = 1 / sqrt(mean(x^2) + eps). One program owns ROWS rows."""
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    row_mask = (rows < n_rows)[:, None]
    cols = tl.arange(0, BLOCK)[None, :]
    x_at = x_ptr + (rows * x_stride)[:, None] + cols
    y_at = y_ptr + (rows * n_cols)[:, None] + cols
    scale_at = scale_ptr + (rows // per_scale * scale_stride)[:, None] + cols
    shift_at = scale_at
    if HAS_SHIFT:
        shift_at = shift_ptr + (rows // per_scale * shift_stride)[:, None] + cols
    dtype = y_ptr.dtype.element_ty
    mask = row_mask & (cols < n_cols)
    first = tl.load(x_at, mask=mask, other=0.0).to(tl.float32)
    squares = first * first
    if LOOPED:
        for start in range(BLOCK, n_cols, BLOCK):
            x = tl.load(x_at + start, mask=row_mask & (start + cols < n_cols), other=0.0)
            squares += x.to(tl.float32) * x.to(tl.float32)
    rstd = tl.rsqrt(tl.sum(squares, 1) / n_cols + eps)
    if LOOPED:
        end = tl.cdiv(n_cols, BLOCK) * BLOCK
        for back in range(BLOCK, n_cols, BLOCK):
            start = end - back
            inside = row_mask & (start + cols < n_cols)
            x = tl.load(x_at + start, mask=inside, other=0.0, eviction_policy="evict_first")
            y = _modulated(
                x.to(tl.float32), rstd, w_ptr, scale_at, shift_at, cols, start, inside, offset, dtype,
                HAS_WEIGHT, HAS_SHIFT, ROUND,
            )  # fmt: skip
            tl.store(y_at + start, y, mask=inside)
    y = _modulated(
        first, rstd, w_ptr, scale_at, shift_at, cols, 0, mask, offset, dtype, HAS_WEIGHT, HAS_SHIFT, ROUND
    )  # fmt: skip
    tl.store(y_at, y, mask=mask)
    tl.store(rstd_ptr + rows, rstd, mask=rows < n_rows)


@triton.jit
def _modulated_rms_norm_bwd(
    dy_ptr,
    x_ptr,
    w_ptr,
    scale_ptr,
    rstd_ptr,
    dx_ptr,
    partial_ptr,
    dscale_ptr,
    dshift_ptr,
    dy_stride,
    x_stride,
    scale_stride,
    n_cols,
    per_scale,
    n_scales,
    parts,
    offset,
    HAS_WEIGHT: tl.constexpr,
    NEEDS_DX: tl.constexpr,
    NEEDS_DW: tl.constexpr,
    NEEDS_DSCALE: tl.constexpr,
    NEEDS_DSHIFT: tl.constexpr,
    PARTED: tl.constexpr,
    ROUND: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
):
    """dx = rstd (m - n mean(m n)), dscale = (offset + w) sum of dy n, dshift = sum of dy, dw = sum of (1 + scale) dy n,
    with n = x rstd and m = dy (1 + scale) (offset + w).

    The rows of each scale are `parts` units. A program walks the units pid, pid + programs, ...: it owns row u of
    dscale and dshift for each of its units u, and row pid of the table of dw in partial_ptr, fp32. PARTED: scales of
    several units get their gradients, and the weight its own, from `_of_parts`; dscale_ptr gets the sums of dy n.
    """
    pid = tl.program_id(0).to(tl.int64)  # and so all that follows from it
    cols = tl.arange(0, BLOCK)
    inside = cols < n_cols
    HERE: tl.constexpr = NEEDS_DW and not PARTED
    if HERE:
        dw = tl.zeros((BLOCK,), tl.float32)
    rows_of_unit = tl.cdiv(per_scale, parts)
    dtype = x_ptr.dtype.element_ty
    for unit in tl.range(pid, n_scales * parts, tl.num_programs(0)):
        which = unit // parts
        first = (unit % parts) * rows_of_unit
        last = tl.minimum(first + rows_of_unit, per_scale)
        scale_at = scale_ptr + which * scale_stride + cols
        factor = 1.0 + tl.load(scale_at, mask=inside, other=0.0).to(tl.float32)
        if HAS_WEIGHT:
            factor *= _row(w_ptr, cols, inside, 1.0, HAS_WEIGHT) + offset
        factor = factor[None, :]
        products = tl.zeros((ROWS, BLOCK), tl.float32)
        total = tl.zeros((ROWS, BLOCK), tl.float32)
        for start in tl.range(first, last, ROWS, num_stages=STAGES):
            in_unit = start + tl.arange(0, ROWS)
            rows = which * per_scale + in_unit
            mask = (in_unit < last)[:, None] & inside[None, :]
            x_at = x_ptr + (rows * x_stride)[:, None] + cols[None, :]
            dy_at = dy_ptr + (rows * dy_stride)[:, None] + cols[None, :]
            dy = tl.load(dy_at, mask=mask, other=0.0).to(tl.float32)
            rstd = tl.load(rstd_ptr + rows, mask=in_unit < last, other=0.0)[:, None]
            n = tl.load(x_at, mask=mask, other=0.0).to(tl.float32) * rstd
            if NEEDS_DX:
                m = dy * factor
                mean_product = (tl.sum(m * n, 1) / n_cols)[:, None]
                dx = rstd * (m - n * mean_product)
                dx_at = dx_ptr + (rows * n_cols)[:, None] + cols[None, :]
                tl.store(dx_at, dx.to(dx_ptr.dtype.element_ty), mask=mask)
            if ROUND:
                n = n.to(dtype).to(tl.float32)
            products += dy * n
            if NEEDS_DSHIFT:
                total += dy
        at = unit * n_cols + cols
        product = tl.sum(products, 0)
        if HERE:
            scale = 1.0 + tl.load(scale_at, mask=inside, other=0.0).to(tl.float32)
            dw += scale * product
        if NEEDS_DSCALE or (NEEDS_DW and PARTED):
            if HAS_WEIGHT and not PARTED:
                product *= _row(w_ptr, cols, inside, 1.0, HAS_WEIGHT) + offset
            tl.store(dscale_ptr + at, product.to(dscale_ptr.dtype.element_ty), mask=inside)
        if NEEDS_DSHIFT:
            dshift = tl.sum(total, 0).to(dshift_ptr.dtype.element_ty)
            tl.store(dshift_ptr + at, dshift, mask=inside)
    if HERE:
        tl.store(partial_ptr + pid * n_cols + cols, dw, mask=inside)


@triton.jit
def _sum_of_parts(ptr, parts, at, n_cols, inside, ROWS: tl.constexpr, COLS: tl.constexpr):
    total = tl.zeros((ROWS, COLS), tl.float32)
    for start in range(0, parts, ROWS):
        part = start + tl.arange(0, ROWS)[:, None]
        where = ptr + part.to(tl.int64) * n_cols + at
        total += tl.load(where, mask=(part < parts) & inside, other=0.0)
    return tl.sum(total, 0)


@triton.jit
def _of_parts(
    products_ptr,
    total_ptr,
    w_ptr,
    scale_ptr,
    dw_ptr,
    dscale_ptr,
    dshift_ptr,
    scale_stride,
    n_cols,
    n_scales,
    parts,
    offset,
    HAS_WEIGHT: tl.constexpr,
    NEEDS_DW: tl.constexpr,
    NEEDS_DSCALE: tl.constexpr,
    NEEDS_DSHIFT: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """What `_modulated_rms_norm_bwd` leaves to do when PARTED. A program owns COLS columns."""
    cols = tl.program_id(0) * COLS + tl.arange(0, COLS)
    inside = cols < n_cols
    weight = _row(w_ptr, cols, inside, 1.0, HAS_WEIGHT)
    if HAS_WEIGHT:
        weight += offset
    dw = tl.zeros((COLS,), tl.float32)
    table = tl.cast(parts, tl.int64) * n_cols
    for which in range(0, n_scales):
        at, wide = cols[None, :], inside[None, :]
        if NEEDS_DW or NEEDS_DSCALE:
            product = _sum_of_parts(products_ptr, parts, at, n_cols, wide, ROWS, COLS)
            products_ptr += table
        if NEEDS_DW:
            scale_at = scale_ptr + tl.cast(which, tl.int64) * scale_stride + cols
            dw += (1.0 + tl.load(scale_at, mask=inside, other=0.0).to(tl.float32)) * product
        if NEEDS_DSCALE:
            dscale = (weight * product).to(dscale_ptr.dtype.element_ty)
            tl.store(dscale_ptr + tl.cast(which, tl.int64) * n_cols + cols, dscale, mask=inside)
        if NEEDS_DSHIFT:
            dshift = _sum_of_parts(total_ptr, parts, at, n_cols, wide, ROWS, COLS)
            dshift = dshift.to(dshift_ptr.dtype.element_ty)
            tl.store(dshift_ptr + tl.cast(which, tl.int64) * n_cols + cols, dshift, mask=inside)
            total_ptr += table
    if NEEDS_DW:
        tl.store(dw_ptr + cols, dw.to(dw_ptr.dtype.element_ty), mask=inside)


def forward(
    x: Tensor,
    weight: Tensor | None,
    scale: Tensor,
    shift: Tensor | None,
    *,
    options: ModulatedRMSNormOptions,
    needs: Needs,
) -> tuple[Tensor, Saved]:
    y = x.new_empty(x.shape)
    if not x.numel():
        return y, (x, weight, scale, shift, None)
    rows, weight = as_rows(x), None if weight is None else weight.contiguous()
    scales, shifts = as_rows(scale), None if shift is None else as_rows(shift)
    n_rows, n_cols = rows.shape
    rstd = x.new_empty(n_rows, dtype=torch.float32)
    tile = RowTile.of(n_cols, facts_of(x.device).most_warps, **FORWARD)
    tile.launch(
        _modulated_rms_norm_fwd,
        n_rows,
        *(rows, weight, scales, shifts, y, rstd),
        *(rows.stride(0), scales.stride(0), 0 if shifts is None else shifts.stride(0)),
        *(n_rows, n_cols, n_rows // scales.shape[0], options.eps, options.offset),
        HAS_WEIGHT=weight is not None,
        HAS_SHIFT=shift is not None,
        ROUND=options.casting_mode == "llama",
    )
    return y, (rows, weight, scale, shift, rstd)


def backward(
    grads: Grads, saved: Saved, *, options: ModulatedRMSNormOptions, needs: Needs
) -> Grads:
    rows, weight, scale, shift, rstd = saved
    if rstd is None:  # no rows
        like = (grads[0], weight, scale, shift)
        return tuple(
            torch.zeros_like(t) if need else None for t, need in zip(like, needs, strict=True)
        )
    needs_dx, needs_dw, needs_dscale, needs_dshift = needs
    dy, scales = as_rows(grads[0]), as_rows(scale)
    n_scales, n_cols = scales.shape
    per_scale = rows.shape[0] // n_scales
    loaded = rows.element_size() + dy.element_size()
    config = BackwardConfig.of(n_cols, per_scale > 1, loaded, facts_of(rows.device))
    parts = min(cdiv(per_scale, config.rows), cdiv(config.programs, n_scales))
    programs = min(n_scales * parts, config.programs)
    parted = parts > 1 and any(needs[1:])
    dx = rows.new_empty(grads[0].shape) if needs_dx else None
    dw = weight.new_empty(n_cols) if weight is not None and needs_dw else None
    dscale, dshift = (
        t.new_empty(t.shape) if t is not None and need else None
        for t, need in ((scale, needs_dscale), (shift, needs_dshift))
    )
    sums, partial = (dscale, dshift), None
    if parted:
        sums = rows.new_empty((2, n_scales, parts, n_cols), dtype=torch.float32).unbind()
    elif needs_dw:
        partial = rows.new_empty((1, programs, n_cols), dtype=torch.float32)
    flags = {
        "HAS_WEIGHT": weight is not None,
        "NEEDS_DW": needs_dw,
        "NEEDS_DSCALE": needs_dscale,
        "NEEDS_DSHIFT": needs_dshift,
    }
    launch(
        _modulated_rms_norm_bwd,
        (programs,),
        *(dy, rows, weight, scales, rstd, dx, partial, *sums),
        *(dy.stride(0), rows.stride(0), scales.stride(0)),
        *(n_cols, per_scale, n_scales, parts, options.offset),
        **flags,
        NEEDS_DX=needs_dx,
        PARTED=parted,
        ROUND=options.casting_mode == "llama",
        ROWS=config.rows,
        BLOCK=config.block,
        STAGES=config.stages,
        num_warps=config.warps,
    )
    if parted:
        launch(
            _of_parts,
            (cdiv(n_cols, _END_COLS),),
            *(*sums, weight, scales, dw, dscale, dshift, scales.stride(0)),
            *(n_cols, n_scales, parts, options.offset),
            **flags,
            ROWS=_END_ROWS,
            COLS=_END_COLS,
            num_warps=8,
        )
    elif partial is not None:
        (dw,) = column_sums(partial, [weight.dtype])
    return dx, dw, dscale, dshift
