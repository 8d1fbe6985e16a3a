"""Sparsemax kernels. Forward moves 2 n elements (x in, y out), backward 3 n (dy and x in, dx out).

Nothing is sorted. sum(max(z - tau, 0)) - 1 is convex and falling in tau, so Newton's steps from the left, where z is x
less its maximum and tau starts at -1, rise to the root and end on it exactly: the support shrinks until it stays the
same. A step divides the product of value and slope by four or more, which bounds their number to about thirty; random
rows take three to eight. Nearly all of these walk over the maxima of the row's parts alone: what sums up to 1 there is
a lower bound of tau, and all elements are looked at once or twice.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from liger_kernel._core.contract import Grads, Needs, Saved
from liger_kernel._core.shapes import as_rows
from liger_kernel.backends import facts_of
from liger_kernel.backends.kernels import RowTile, reach_of, zero_beyond
from liger_kernel.ops.sparsemax.contract import SparsemaxOptions

#: A step waits for two reductions, so that rows share a program only where they are short. Backward holds two rows.
#: H200: 4096x8192 forward 0.079 -> 0.064 ms, of 8192x16384 0.440 -> 0.281, backward of the former 0.060 -> 0.052.
FORWARD = {"elements": 2048, "longest": 16384, "walked": 16384, "per_thread": 64}
BACKWARD = {"elements": 4096, "longest": 16384, "walked": 16384, "per_thread": 32}
# the reach of each row takes registers, too: 4096 elements spill on Blackwell
BACKWARD_CAUSAL = {**BACKWARD, "elements": 2048}
#: of rows beyond, both ways. Measured on an H200: 1024x128256 0.306 -> 0.263 ms forward, 0.370 -> 0.305 backward,
#: though rows that are not aligned spill there. Others take what spills nowhere.
LOOPED = {"elements": 4096, "longest": 16384, "walked": 8192, "per_thread": 16}
LOOPED_ON_HOPPER = {**LOOPED, "walked": 16384}


@triton.jit
def _above(z, tau):
    """Whether z is in the support; NaN is, and makes all that follows NaN."""
    return (z <= tau[:, None]) == 0


@triton.jit
def _start(maxima, top):
    """tau of the maxima of parts of the rows: but for rounding, no greater than that of the rows."""
    z = maxima - top[:, None]
    tau = top * 0.0 - 1.0
    rising = tl.program_id(0) >= 0
    while rising:
        above = _above(z, tau)
        # one reduction for both sums, since a step waits for it
        both = tl.join(tl.where(above, z, 0.0), above.to(tl.float32))
        total, count = tl.split(tl.sum(both, 1))
        step = (total - 1.0) / count
        rising = tl.max((step > tau).to(tl.int32), 0) > 0
        tau = tl.where(step > tau, step, tau)
    return tau


@triton.jit
def _sparsemax_fwd(
    x_ptr,
    y_ptr,
    top_ptr,
    tau_ptr,
    x_stride,
    n_rows,
    n_cols,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    LOOPED: tl.constexpr,
    CAUSAL: tl.constexpr,
):
    """y = max(z - tau, 0) with z = x - max and sum(y) = 1. One program owns ROWS rows, and their max and tau."""
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    row_mask = (rows < n_rows)[:, None]
    cols = tl.arange(0, BLOCK)[None, :]
    x_at = x_ptr + (rows * x_stride)[:, None] + cols
    y_at = y_ptr + (rows * n_cols)[:, None] + cols
    dtype = y_ptr.dtype.element_ty
    reach = reach_of(rows, n_cols, CAUSAL)
    mask = row_mask & (cols < reach)
    first = tl.load(x_at, mask=mask, other=float("-inf")).to(tl.float32)
    first = tl.where(row_mask, first, 0.0)  # rows beyond the last: numbers, not -inf less -inf
    maxima = first
    if LOOPED:
        for start in range(BLOCK, n_cols, BLOCK):
            inside = row_mask & (start + cols < reach)
            x = tl.load(x_at + start, mask=inside, other=float("-inf")).to(tl.float32)
            maxima = tl.maximum(maxima, x)
    PARTS: tl.constexpr = BLOCK // 8 if BLOCK > 8 else 1
    maxima = tl.max(tl.reshape(maxima, (ROWS, PARTS, BLOCK // PARTS)), 2)
    top = tl.max(maxima, 1)
    first -= top[:, None]
    support = _start(maxima, top)  # what is above it
    tau = support * 0.0 - 2.0
    rising = tl.program_id(0) >= 0
    while rising:
        above = _above(first, support)
        count = above.to(tl.float32)
        total = tl.where(above, first, 0.0)
        if LOOPED:
            for start in range(BLOCK, n_cols, BLOCK):
                inside = row_mask & (start + cols < reach)
                x = tl.load(x_at + start, mask=inside, other=float("-inf")).to(tl.float32)
                z = x - top[:, None]
                above = _above(z, support)
                count += above.to(tl.float32)
                total += tl.where(above, z, 0.0)
        step = tl.div_rn(tl.sum(total, 1) - 1.0, tl.sum(count, 1))
        rising = tl.max((step > tau).to(tl.int32), 0) > 0
        tau = tl.where(step <= tau, tau, step)
        support = tau
    if LOOPED:
        end = tl.cdiv(n_cols, BLOCK) * BLOCK
        for back in range(BLOCK, n_cols, BLOCK):
            start = end - back
            inside = row_mask & (start + cols < reach)
            x = tl.load(x_at + start, mask=inside, other=0.0, eviction_policy="evict_first")
            z = x.to(tl.float32) - top[:, None]
            y = tl.where(_above(z, tau), z - tau[:, None], 0.0)
            y = zero_beyond(y, inside, CAUSAL)
            tl.store(y_at + start, y.to(dtype), mask=row_mask & (start + cols < n_cols))
    y = tl.where(_above(first, tau), first - tau[:, None], 0.0)
    y = zero_beyond(y, mask, CAUSAL)
    tl.store(y_at, y.to(dtype), mask=row_mask & (cols < n_cols))
    tl.store(top_ptr + rows, top, mask=rows < n_rows)
    tl.store(tau_ptr + rows, tau, mask=rows < n_rows)


@triton.jit
def _load_above(dy_at, x_at, top, tau, inside):
    """dy, 0 outside the support, and whether there."""
    x = tl.load(x_at, mask=inside, other=float("-inf")).to(tl.float32)
    above = _above(x - top[:, None], tau)
    dy = tl.load(dy_at, mask=inside, other=0.0).to(tl.float32)
    return tl.where(above, dy, 0.0), above


@triton.jit
def _sparsemax_bwd(
    dy_ptr,
    x_ptr,
    dx_ptr,
    top_ptr,
    tau_ptr,
    dy_stride,
    x_stride,
    n_rows,
    n_cols,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    LOOPED: tl.constexpr,
    CAUSAL: tl.constexpr,
):
    """dx = dy less its mean over the support, and 0 outside. One program owns ROWS rows."""
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    row_mask = (rows < n_rows)[:, None]
    cols = tl.arange(0, BLOCK)[None, :]
    dy_at = dy_ptr + (rows * dy_stride)[:, None] + cols
    x_at = x_ptr + (rows * x_stride)[:, None] + cols
    dx_at = dx_ptr + (rows * n_cols)[:, None] + cols
    dtype = dx_ptr.dtype.element_ty
    reach = reach_of(rows, n_cols, CAUSAL)
    mask = row_mask & (cols < reach)
    top = tl.load(top_ptr + rows, mask=rows < n_rows, other=0.0)
    tau = tl.load(tau_ptr + rows, mask=rows < n_rows, other=-1.0)
    first, first_above = _load_above(dy_at, x_at, top, tau, mask)
    total = first
    count = first_above.to(tl.float32)
    if LOOPED:
        for start in range(BLOCK, n_cols, BLOCK):
            inside = row_mask & (start + cols < reach)
            dy, above = _load_above(dy_at + start, x_at + start, top, tau, inside)
            total += dy
            count += above.to(tl.float32)
    mean = (tl.sum(total, 1) / tl.sum(count, 1))[:, None]
    if LOOPED:
        end = tl.cdiv(n_cols, BLOCK) * BLOCK
        for back in range(BLOCK, n_cols, BLOCK):
            start = end - back
            inside = row_mask & (start + cols < reach)
            dy, above = _load_above(dy_at + start, x_at + start, top, tau, inside)
            dx = zero_beyond(tl.where(above, dy - mean, 0.0), inside, CAUSAL)
            tl.store(dx_at + start, dx.to(dtype), mask=row_mask & (start + cols < n_cols))
    dx = zero_beyond(tl.where(first_above, first - mean, 0.0), mask, CAUSAL)
    tl.store(dx_at, dx.to(dtype), mask=row_mask & (cols < n_cols))


def forward(
    x: Tensor, *, options: SparsemaxOptions, needs: Needs
) -> tuple[Tensor, tuple[Tensor, ...]]:
    y = x.new_empty(x.shape)
    if not x.numel():
        return y, (x, x, x)
    rows = as_rows(x)
    top, tau = (x.new_empty(rows.shape[0], dtype=torch.float32) for _ in range(2))
    _launch(_sparsemax_fwd, FORWARD, options, rows.shape, rows, y, top, tau, rows.stride(0))
    return y, (rows, top, tau)


def backward(grads: Grads, saved: Saved, *, options: SparsemaxOptions, needs: Needs) -> Grads:
    rows, top, tau = saved
    dx = rows.new_empty(grads[0].shape)
    if dx.numel():
        dy = as_rows(grads[0])
        inputs = dy, rows, dx, top, tau, dy.stride(0), rows.stride(0)
        sizes = BACKWARD_CAUSAL if options.causal else BACKWARD
        _launch(_sparsemax_bwd, sizes, options, rows.shape, *inputs)
    return (dx,)


def _launch(
    kernel: triton.JITFunction,
    sizes: dict[str, int],
    options: SparsemaxOptions,
    shape: torch.Size,
    *inputs: Tensor | int,
) -> None:
    n_rows, n_cols = shape
    facts = facts_of(inputs[0].device)
    if n_cols > sizes["longest"]:
        sizes = LOOPED_ON_HOPPER if facts.architecture == "hopper" else LOOPED
    tile = RowTile.of(n_cols, facts.most_warps, **sizes)
    tile.launch(kernel, n_rows, *inputs, n_rows, n_cols, CAUSAL=options.causal)
