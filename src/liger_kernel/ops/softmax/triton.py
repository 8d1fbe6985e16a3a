"""Softmax kernels. Forward moves 2 n elements (x in, y out), backward 3 n (dy and y in, dx out).

A row that does not fit the registers of a program is shared by a cluster of them, where there are clusters. Elsewhere,
and if it is no whole vectors, it is read twice, the second time from its end: what was read last is most likely to be
in the L2 still. Its first block stays in registers.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from liger_kernel._core.contract import Grads, Needs, Saved
from liger_kernel._core.shapes import as_rows
from liger_kernel.backends import facts_of
from liger_kernel.backends.clusters import (
    SharedRow,
    columns_of_parts,
    narrow,
    open_box,
    softmax_of_parts,
    sum_of_parts,
)
from liger_kernel.backends.kernels import RowTile, exp, reach_of, zero_beyond
from liger_kernel.ops.softmax.contract import SoftmaxOptions

#: Backward holds two rows where forward holds one. While a long row is walked, STAGES blocks of it are in flight.
FORWARD = {"elements": 4096, "longest": 32768, "walked": 16384, "per_thread": 16}
BACKWARD = {"elements": 4096, "longest": 16384, "walked": 8192, "per_thread": 16}
STAGES = 3
#: of a program that shares a row of 16-bit numbers; measured for 32768 to 128256 columns, on Hopper
SHARED = {"block": 16384, "warps": 8}


@triton.jit
def _shifted(x, top):
    """exp(x - top), of a row that is -inf so far 0."""
    return tl.exp(x - tl.where(top == float("-inf"), 0.0, top)[:, None])


@triton.jit
def _softmax_fwd(
    x_ptr,
    y_ptr,
    x_stride,
    n_rows,
    n_cols,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    LOOPED: tl.constexpr,
    CAUSAL: tl.constexpr,
    STAGES: tl.constexpr,
):
    """y = exp(x - max) / sum(exp(x - max)). One program owns ROWS rows."""
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    row_mask = (rows < n_rows)[:, None]
    cols = tl.arange(0, BLOCK)[None, :]
    x_at = x_ptr + (rows * x_stride)[:, None] + cols
    y_at = y_ptr + (rows * n_cols)[:, None] + cols
    dtype = y_ptr.dtype.element_ty
    reach = reach_of(rows, n_cols, CAUSAL)
    mask = row_mask & (cols < reach)
    first = tl.load(x_at, mask=mask, other=float("-inf")).to(tl.float32)
    top = tl.max(first, 1)
    total = _shifted(first, top)
    if LOOPED:
        for start in tl.range(BLOCK, n_cols, BLOCK, num_stages=STAGES):
            inside = row_mask & (start + cols < reach)
            x = tl.load(x_at + start, mask=inside, other=float("-inf")).to(tl.float32)
            before = top
            top = tl.maximum(top, tl.max(x, 1))
            total = total * _shifted(before[:, None], top) + _shifted(x, top)
    scale = 1.0 / tl.sum(total, 1)[:, None]
    if LOOPED:
        end = tl.cdiv(n_cols, BLOCK) * BLOCK
        for back in tl.range(BLOCK, n_cols, BLOCK, num_stages=STAGES):
            start = end - back
            inside = row_mask & (start + cols < reach)
            x = tl.load(x_at + start, mask=inside, other=0.0, eviction_policy="evict_first")
            y = zero_beyond(_shifted(x.to(tl.float32), top) * scale, inside, CAUSAL)
            tl.store(y_at + start, y.to(dtype), mask=row_mask & (start + cols < n_cols))
    y = zero_beyond(_shifted(first, top) * scale, mask, CAUSAL)
    tl.store(y_at, y.to(dtype), mask=row_mask & (cols < n_cols))


@triton.jit
def _softmax_bwd(
    dy_ptr,
    y_ptr,
    dx_ptr,
    dy_stride,
    n_rows,
    n_cols,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    LOOPED: tl.constexpr,
    CAUSAL: tl.constexpr,
    STAGES: tl.constexpr,
):
    """dx = y (dy - sum(dy y)). One program owns ROWS rows."""
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    row_mask = (rows < n_rows)[:, None]
    cols = tl.arange(0, BLOCK)[None, :]
    dy_at = dy_ptr + (rows * dy_stride)[:, None] + cols
    y_at = (rows * n_cols)[:, None] + cols
    dtype = dx_ptr.dtype.element_ty
    reach = reach_of(rows, n_cols, CAUSAL)
    mask = row_mask & (cols < reach)
    first_dy = tl.load(dy_at, mask=mask, other=0.0).to(tl.float32)
    first_y = tl.load(y_ptr + y_at, mask=mask, other=0.0).to(tl.float32)
    products = first_dy * first_y
    if LOOPED:
        for start in tl.range(BLOCK, n_cols, BLOCK, num_stages=STAGES):
            inside = row_mask & (start + cols < reach)
            dy = tl.load(dy_at + start, mask=inside, other=0.0).to(tl.float32)
            y = tl.load(y_ptr + y_at + start, mask=inside, other=0.0).to(tl.float32)
            products += dy * y
    total = tl.sum(products, 1)[:, None]
    if LOOPED:
        end = tl.cdiv(n_cols, BLOCK) * BLOCK
        for back in tl.range(BLOCK, n_cols, BLOCK, num_stages=STAGES):
            start = end - back
            inside = row_mask & (start + cols < reach)
            dy = tl.load(dy_at + start, mask=inside, other=0.0, eviction_policy="evict_first")
            y = tl.load(y_ptr + y_at + start, mask=inside, other=0.0, eviction_policy="evict_first")
            dx = zero_beyond(y.to(tl.float32) * (dy.to(tl.float32) - total), inside, CAUSAL)
            to = dx_ptr + y_at + start
            tl.store(to, dx.to(dtype), mask=row_mask & (start + cols < n_cols))
    dx = zero_beyond(first_y * (first_dy - total), mask, CAUSAL)
    tl.store(dx_ptr + y_at, dx.to(dtype), mask=row_mask & (cols < n_cols))


@triton.jit
def _softmax_shared_fwd(
    x_ptr,
    y_ptr,
    x_stride,
    n_cols,
    n_part,
    PARTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """`_softmax_fwd` of one row, of which each program of a cluster owns n_part columns."""
    box = open_box()
    row = tl.program_id(0).to(tl.int64)
    at, mask = columns_of_parts(n_cols, n_part, PARTS, BLOCK)
    x = tl.load(x_ptr + row * x_stride + at, mask=mask, other=float("-inf")).to(tl.float32)
    top = tl.max(x, 1)
    anchor = tl.where(top == float("-inf"), 0.0, top)
    powers = exp(x - anchor[:, None])
    row_top, total = softmax_of_parts(box, top, tl.sum(powers, 1), PARTS)
    y = powers * (tl.exp(top - row_top) / total)[:, None]
    tl.store(y_ptr + row * n_cols + at, y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _softmax_shared_bwd(
    dy_ptr,
    y_ptr,
    dx_ptr,
    dy_stride,
    n_cols,
    n_part,
    PARTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """`_softmax_bwd` of one row, of which each program of a cluster owns n_part columns."""
    box = open_box()
    row = tl.program_id(0).to(tl.int64)
    at, mask = columns_of_parts(n_cols, n_part, PARTS, BLOCK)
    dy = tl.load(dy_ptr + row * dy_stride + at, mask=mask, other=0.0)
    y = tl.load(y_ptr + row * n_cols + at, mask=mask, other=0.0)
    total = sum_of_parts(box, tl.sum(dy.to(tl.float32) * y.to(tl.float32), 1), PARTS)
    dx = narrow(y).to(tl.float32) * (narrow(dy).to(tl.float32) - total)
    tl.store(dx_ptr + row * n_cols + at, dx.to(dx_ptr.dtype.element_ty), mask=mask)


def forward(x: Tensor, *, options: SoftmaxOptions, needs: Needs) -> tuple[Tensor, tuple[Tensor]]:
    y = x.new_empty(x.shape)
    if x.numel():
        kernels = _softmax_fwd, _softmax_shared_fwd
        _launch(*kernels, FORWARD, x.element_size(), as_rows(x), y, causal=options.causal)
    return y, (y,)


def backward(grads: Grads, saved: Saved, *, options: SoftmaxOptions, needs: Needs) -> Grads:
    (y,) = saved
    dx = torch.empty_like(y)
    if y.numel():
        loaded = y.element_size() + grads[0].element_size()
        kernels = _softmax_bwd, _softmax_shared_bwd
        _launch(*kernels, BACKWARD, loaded, as_rows(grads[0]), y, dx, causal=options.causal)
    return (dx,)


def _launch(
    kernel: triton.JITFunction,
    shared: triton.JITFunction,
    sizes: dict[str, int],
    loaded: int,
    rows: Tensor,
    *others: Tensor,
    causal: bool,
) -> None:
    """`loaded`: bytes that are read of a column."""
    (n_rows, n_cols), facts = rows.shape, facts_of(rows.device)
    tile = RowTile.of(n_cols, facts.most_warps, **sizes)
    arguments = (rows, *others, rows.stride(0))
    parts = None
    if tile.looped and rows.element_size() == 2 and not causal:
        parts = SharedRow.of(n_cols, rows.stride(0), facts, **SHARED)
    if parts is not None:
        parts.launch(shared, n_rows, *arguments, n_cols)
        return
    stages = facts.stages(STAGES, tile.block * loaded) if tile.looped else 1
    tile.launch(kernel, n_rows, *arguments, n_rows, n_cols, CAUSAL=causal, STAGES=stages)
