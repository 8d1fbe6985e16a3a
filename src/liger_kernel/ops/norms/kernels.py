"""Kernels that normalise rows: RMSNorm, add + RMSNorm and LayerNorm are one forward and one backward kernel.

What an op does not have, a constexpr takes out: the residual, the weight, the bias, the mean (CENTERED). Forward moves
2 n elements (x in, y out), backward 3 n (dy and x in, dx out); a residual adds 2 n to the one and n to the other.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from liger_kernel._core.contract import Grads, Needs
from liger_kernel._core.shapes import as_rows, cdiv, next_power_of_2
from liger_kernel.backends import facts_of
from liger_kernel.backends.kernels import column_sums, launch
from liger_kernel.backends.records import DeviceFacts

LONGEST = 8192  # columns of a tile that is loaded ahead
FORWARD_TILE = 2048  # elements of a forward tile of short rows
#: architecture -> backward of rows up to so many columns: elements of a tile, warps, stages, programs per processor.
#: Loading ahead is worth a quarter: one stage reaches 66 to 75 % of copy speed, these 83 to 93 % (456 settings on an
#: H200, 600 on an H100 with rows of 64 to 2048). Where nothing was measured, nothing is loaded ahead.
TILES = {
    "hopper": (
        (128, 4096, 8, 4, 1),
        (512, 2048, 2, 4, 2),
        (2048, 4096, 4, 4, 1),
        (LONGEST, LONGEST, 8, 3, 1),
    )
}


@dataclass(frozen=True)
class Config:
    """Forward tile of (rows, block) elements; `looped` reads rows that do not fit the registers block by block.

    Measured on an H100: 2048x32768 takes 0.096 ms at once and 0.113 in blocks of 8192, 1024x65536 0.125 in blocks of
    16384 and 0.140 in those of 8192. Of a block of 32768 at least three quarters have to be columns.
    """

    rows: int
    block: int
    looped: bool
    warps: int

    @staticmethod
    @functools.cache
    def of(n_cols: int, facts: DeviceFacts, centered: bool = False) -> Config:
        block = min(next_power_of_2(n_cols), 32768 if 24576 < n_cols <= 32768 else 16384)
        rows = max(1, FORWARD_TILE // block)
        looped = n_cols > block
        most = facts.most_warps if looped and not centered else 16
        return Config(rows, block, looped, warps=min(most, max(4, rows * block // 512)))


@dataclass(frozen=True)
class BackwardConfig:
    """Backward tile of (rows, block) elements, `stages` of them in flight through shared memory.

    Of rows longer than LONGEST, the running sums fill the registers (H100, 400 settings). One sum of up to 12288 leaves
    room for the row; sums of up to 40960 numbers leave none, and the row is read again from the L2 (`reload`); beyond,
    dx and the sums take a kernel each (`two_kernels`), and rows, block and warps are those of the sums.
    """

    rows: int
    block: int
    warps: int
    programs: int  # at most
    stages: int
    reload: bool = False
    two_kernels: bool = False
    dx_warps: int = 16  # with two kernels

    @staticmethod
    @functools.cache
    def of(n_cols: int, bytes_per_column: int, n_sums: int, facts: DeviceFacts) -> BackwardConfig:
        """`bytes_per_column`: of all that is read, x and dy and what else; `n_sums`: of dw and db, those needed."""
        block, processors = next_power_of_2(n_cols), facts.processors
        if n_cols <= LONGEST:
            measured = (t for t in TILES.get(facts.architecture, ()) if block <= t[0])
            _, tile, warps, stages, programs = next(measured, (0, LONGEST, 0, 1, 0))
            stages = facts.stages(stages, tile * bytes_per_column)
            if stages == 1:  # as many elements in flight by more programs
                tile = max(block, 2048)
                warps, programs = tile // 512, LONGEST // tile
            return BackwardConfig(tile // block, block, warps, programs * processors, stages)
        if n_sums == 1 and n_cols <= 12288:
            return BackwardConfig(1, block, 16, processors, 1)
        # two sums of more than 16384 numbers spill up to 3 KiB a thread as compiled for sm_80, 0.4 KiB for others
        most_sums = 40960 if facts.architecture in ("hopper", "") else 32768
        # H200, RMSNorm 2048x32768 in bf16: 0.180 ms, with two kernels 0.199; in fp32 3.4 KB a thread would spill
        one = facts.architecture == "hopper" and bytes_per_column <= 6
        longest = 32768 if one else 24576
        if n_cols <= longest and 0 < n_sums * n_cols <= most_sums:
            warps = facts.most_warps if n_sums * n_cols <= 16384 else 16
            return BackwardConfig(1, block, warps, processors, 1, reload=True)
        # of the sums: a row has a dozen blocks of columns, each with programs of its own
        rows, columns = 4, 2048
        stages = facts.stages(3, rows * columns * bytes_per_column)
        return BackwardConfig(
            rows,
            columns,
            8,
            max(1, processors // 8),
            stages,
            two_kernels=True,
            dx_warps=facts.most_warps,
        )


@triton.jit
def _load_input(x_ptr, r_ptr, x_at, r_at, mask, HAS_RESIDUAL: tl.constexpr):
    """x, or x + residual as the dtype of x holds it."""
    x = tl.load(x_ptr + x_at, mask=mask, other=0.0).to(tl.float32)
    if HAS_RESIDUAL:
        x += tl.load(r_ptr + r_at, mask=mask, other=0.0).to(tl.float32)
        x = x.to(x_ptr.dtype.element_ty).to(tl.float32)
    return x


@triton.jit
def _normed(x, rstd, ROUND: tl.constexpr, dtype: tl.constexpr):
    normed = x * rstd[:, None]
    return normed.to(dtype).to(tl.float32) if ROUND else normed


@triton.jit
def _store_output(
    y_ptr,
    w_ptr,
    b_ptr,
    normed,
    y_at,
    cols,
    offset,
    row_mask,
    N: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
):
    """y = normed (offset + w) + b."""
    if HAS_WEIGHT:
        normed = normed * (tl.load(w_ptr + cols, mask=cols < N, other=0.0).to(tl.float32) + offset)
    if HAS_BIAS:
        normed = normed + tl.load(b_ptr + cols, mask=cols < N, other=0.0).to(tl.float32)
    tl.store(y_ptr + y_at + cols, normed.to(y_ptr.dtype.element_ty), mask=row_mask & (cols < N))


@triton.jit
def _norm_fwd(
    x_ptr,
    r_ptr,
    w_ptr,
    b_ptr,
    y_ptr,
    s_ptr,
    mean_ptr,
    rstd_ptr,
    x_stride,
    r_stride,
    n_rows,
    eps,
    offset,
    N: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    CENTERED: tl.constexpr,
    ROUND: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    LOOPED: tl.constexpr,
):
    """s = x + residual, y = (s - mean) rstd (offset + w) + b, rstd = 1 / sqrt(mean((s - mean)^2) + eps).

    Without CENTERED the mean is left out. One program owns ROWS rows.
    """
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    row_mask = (rows < n_rows)[:, None]
    x_at = (rows * x_stride)[:, None]
    r_at = (rows * r_stride)[:, None]
    y_at = (rows * N)[:, None]
    cols = tl.arange(0, BLOCK)[None, :]
    dtype = x_ptr.dtype.element_ty
    mean = tl.zeros((ROWS,), tl.float32)
    if LOOPED:
        if CENTERED:
            total = tl.zeros((ROWS, BLOCK), tl.float32)
            for start in range(0, N, BLOCK):
                at = start + cols
                mask = row_mask & (at < N)
                total += _load_input(x_ptr, r_ptr, x_at + at, r_at + at, mask, HAS_RESIDUAL)
            mean = tl.sum(total, 1) / N
        squares = tl.zeros((ROWS, BLOCK), tl.float32)
        for start in range(0, N, BLOCK):
            at = start + cols
            mask = row_mask & (at < N)
            x = _load_input(x_ptr, r_ptr, x_at + at, r_at + at, mask, HAS_RESIDUAL)
            if HAS_RESIDUAL:
                tl.store(s_ptr + y_at + at, x.to(dtype), mask=mask)
            x = tl.where(mask, x - mean[:, None], 0.0)
            squares += x * x
        rstd = tl.rsqrt(tl.sum(squares, 1) / N + eps)
        for start in range(0, N, BLOCK):
            at = start + cols
            # the residual is added again: a read of s would have to wait for the stores of other threads
            x = _load_input(x_ptr, r_ptr, x_at + at, r_at + at, row_mask & (at < N), HAS_RESIDUAL)
            y = _normed(x - mean[:, None], rstd, ROUND, dtype)
            _store_output(
                y_ptr, w_ptr, b_ptr, y, y_at, at, offset, row_mask, N, HAS_WEIGHT, HAS_BIAS
            )
    else:
        mask = row_mask & (cols < N)
        x = _load_input(x_ptr, r_ptr, x_at + cols, r_at + cols, mask, HAS_RESIDUAL)
        if HAS_RESIDUAL:
            tl.store(s_ptr + y_at + cols, x.to(dtype), mask=mask)
        if CENTERED:
            mean = tl.sum(x, 1) / N
            x = tl.where(mask, x - mean[:, None], 0.0)
        rstd = tl.rsqrt(tl.sum(x * x, 1) / N + eps)
        y = _normed(x, rstd, ROUND, dtype)
        _store_output(y_ptr, w_ptr, b_ptr, y, y_at, cols, offset, row_mask, N, HAS_WEIGHT, HAS_BIAS)
    if CENTERED:
        tl.store(mean_ptr + rows, mean, mask=rows < n_rows)
    tl.store(rstd_ptr + rows, rstd, mask=rows < n_rows)


@triton.jit
def _load_centered(
    x_ptr, mean_ptr, rows, x_at, row_mask, mask, CENTERED: tl.constexpr, AGAIN: tl.constexpr
):
    """x - mean; outside the mask it is whatever: every use multiplies it with a dy of zero.

    AGAIN changes the policy alone: of two loads that are the same, the compiler would keep the values of one.
    """
    if AGAIN:
        x = tl.load(x_ptr + x_at, mask=mask, other=0.0, eviction_policy="evict_first")
    else:
        x = tl.load(x_ptr + x_at, mask=mask, other=0.0)
    x = x.to(tl.float32)
    if CENTERED:
        x -= tl.load(mean_ptr + rows, mask=row_mask, other=0.0)[:, None]
    return x


@triton.jit
def _norm_bwd(
    dy_ptr,
    ds_ptr,
    x_ptr,
    w_ptr,
    mean_ptr,
    rstd_ptr,
    dx_ptr,
    partial_ptr,
    dy_stride,
    ds_stride,
    x_stride,
    n_rows,
    offset,
    N: tl.constexpr,
    HAS_DS: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    CENTERED: tl.constexpr,
    NEEDS_DX: tl.constexpr,
    NEEDS_DW: tl.constexpr,
    NEEDS_DB: tl.constexpr,
    ROUND: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
    RELOAD: tl.constexpr,
):
    """dx = rstd (m - n mean(m n) - mean(m)) + ds, dw = sum over rows of dy n, db = sum over rows of dy,
    with n = (x - mean) rstd and m = dy (offset + w); without CENTERED both means of values are left out.

    Programs are persistent: each loops over the tiles pid, pid + programs, ..., accumulates dw and db in registers, and
    owns row `pid` of each of the (programs, N) tables in partial_ptr, fp32: first dw, then db, where they are needed.
    Long rows are read twice (RELOAD), the second time from the L2: the registers hold dw and db, and nothing else fits.
    """
    pid = tl.program_id(0)
    n_programs = tl.num_programs(0)
    cols = tl.arange(0, BLOCK)[None, :]
    if HAS_WEIGHT and not RELOAD:
        w = tl.load(w_ptr + cols, mask=cols < N, other=0.0).to(tl.float32) + offset
    dw = tl.zeros((ROWS, BLOCK), tl.float32)
    db = tl.zeros((ROWS, BLOCK), tl.float32)
    for tile in tl.range(pid, tl.cdiv(n_rows, ROWS), n_programs, num_stages=STAGES):
        rows = tile * ROWS + tl.arange(0, ROWS).to(tl.int64)
        mask = (rows < n_rows)[:, None] & (cols < N)
        x_at = (rows * x_stride)[:, None] + cols
        x = _load_centered(x_ptr, mean_ptr, rows, x_at, rows < n_rows, mask, CENTERED, False)
        dy_at = (rows * dy_stride)[:, None] + cols
        dy = tl.load(dy_ptr + dy_at, mask=mask, other=0.0).to(tl.float32)
        rstd = tl.load(rstd_ptr + rows, mask=rows < n_rows, other=0.0)
        if NEEDS_DX:
            normed = x * rstd[:, None]
            if HAS_WEIGHT and RELOAD:
                w = tl.load(w_ptr + cols, mask=cols < N, other=0.0).to(tl.float32) + offset
            m = dy * w if HAS_WEIGHT else dy
            mean_product = tl.sum(m * normed, 1) / N
            if CENTERED:
                mean_m = tl.sum(m, 1) / N
            if RELOAD:
                x = _load_centered(x_ptr, mean_ptr, rows, x_at, rows < n_rows, mask, CENTERED, True)
                dy = tl.load(dy_ptr + dy_at, mask=mask, other=0.0, eviction_policy="evict_first")
                dy = dy.to(tl.float32)
                normed = x * rstd[:, None]
                m = dy
                if HAS_WEIGHT:
                    w = tl.load(
                        w_ptr + cols, mask=cols < N, other=0.0, eviction_policy="evict_last"
                    )
                    m *= w.to(tl.float32) + offset
            dx = m - normed * mean_product[:, None]
            if CENTERED:
                dx -= mean_m[:, None]
            dx *= rstd[:, None]
            if HAS_DS:
                ds_at = (rows * ds_stride)[:, None] + cols
                dx += tl.load(ds_ptr + ds_at, mask=mask, other=0.0).to(tl.float32)
            dx_at = (rows * N)[:, None] + cols
            tl.store(dx_ptr + dx_at, dx.to(dx_ptr.dtype.element_ty), mask=mask)
        if NEEDS_DW:
            dw += dy * _normed(x, rstd, ROUND, x_ptr.dtype.element_ty)
        if NEEDS_DB:
            db += dy
    cols_1d = tl.arange(0, BLOCK)
    if NEEDS_DW:
        tl.store(partial_ptr + pid * N + cols_1d, tl.sum(dw, 0), mask=cols_1d < N)
        partial_ptr += n_programs * N
    if NEEDS_DB:
        tl.store(partial_ptr + pid * N + cols_1d, tl.sum(db, 0), mask=cols_1d < N)


@triton.jit
def _norm_bwd_dx_looped(
    dy_ptr,
    ds_ptr,
    x_ptr,
    w_ptr,
    mean_ptr,
    rstd_ptr,
    dx_ptr,
    dy_stride,
    ds_stride,
    x_stride,
    offset,
    N: tl.constexpr,
    HAS_DS: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    CENTERED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """dx as in `_norm_bwd`, for a row that does not fit the registers. One program owns one row."""
    row = tl.program_id(0).to(tl.int64)
    rstd = tl.load(rstd_ptr + row)
    mean = tl.load(mean_ptr + row) if CENTERED else 0.0
    cols = tl.arange(0, BLOCK)
    products = tl.zeros((BLOCK,), tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, N, BLOCK):
        at = start + cols
        mask = at < N
        x = tl.load(x_ptr + row * x_stride + at, mask=mask, other=0.0).to(tl.float32) - mean
        m = tl.load(dy_ptr + row * dy_stride + at, mask=mask, other=0.0).to(tl.float32)
        if HAS_WEIGHT:
            m *= tl.load(w_ptr + at, mask=mask, other=0.0).to(tl.float32) + offset
        products += m * x
        if CENTERED:
            total += m
    mean_product = tl.sum(products, 0) * rstd / N
    mean_m = tl.sum(total, 0) / N
    for start in range(0, N, BLOCK):
        at = start + cols
        mask = at < N
        x = tl.load(x_ptr + row * x_stride + at, mask=mask, other=0.0).to(tl.float32) - mean
        m = tl.load(dy_ptr + row * dy_stride + at, mask=mask, other=0.0).to(tl.float32)
        if HAS_WEIGHT:
            m *= tl.load(w_ptr + at, mask=mask, other=0.0).to(tl.float32) + offset
        dx = rstd * (m - x * rstd * mean_product - mean_m)
        if HAS_DS:
            dx += tl.load(ds_ptr + row * ds_stride + at, mask=mask, other=0.0).to(tl.float32)
        tl.store(dx_ptr + row * N + at, dx.to(dx_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _norm_bwd_partial_looped(
    dy_ptr,
    x_ptr,
    mean_ptr,
    rstd_ptr,
    partial_ptr,
    dy_stride,
    x_stride,
    n_rows,
    N: tl.constexpr,
    CENTERED: tl.constexpr,
    NEEDS_DW: tl.constexpr,
    NEEDS_DB: tl.constexpr,
    ROUND: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
):
    """dw and db for long rows: program (r, c) owns BLOCK columns of every tile of ROWS rows, r modulo programs."""
    pid = tl.program_id(0)
    n_programs = tl.num_programs(0)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    dw = tl.zeros((ROWS, BLOCK), tl.float32)
    db = tl.zeros((ROWS, BLOCK), tl.float32)
    for tile in tl.range(pid, tl.cdiv(n_rows, ROWS), n_programs, num_stages=STAGES):
        rows = tile * ROWS + tl.arange(0, ROWS).to(tl.int64)
        mask = (rows < n_rows)[:, None] & (cols < N)[None, :]
        dy_at = (rows * dy_stride)[:, None] + cols[None, :]
        dy = tl.load(dy_ptr + dy_at, mask=mask, other=0.0).to(tl.float32)
        if NEEDS_DW:
            x_at = (rows * x_stride)[:, None] + cols[None, :]
            x = _load_centered(x_ptr, mean_ptr, rows, x_at, rows < n_rows, mask, CENTERED, False)
            rstd = tl.load(rstd_ptr + rows, mask=rows < n_rows, other=0.0)
            dw += dy * _normed(x, rstd, ROUND, x_ptr.dtype.element_ty)
        if NEEDS_DB:
            db += dy
    if NEEDS_DW:
        tl.store(partial_ptr + pid * N + cols, tl.sum(dw, 0), mask=cols < N)
        partial_ptr += n_programs * N
    if NEEDS_DB:
        tl.store(partial_ptr + pid * N + cols, tl.sum(db, 0), mask=cols < N)


def norm_forward(
    x: Tensor,
    options: Any,
    weight: Tensor | None,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    *,
    centered: bool = False,
) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None, Tensor]:
    """(y, x + residual, x as rows, mean, rstd); `options` has eps, offset and casting_mode."""
    rows = as_rows(x)  # (R, N)
    r_rows = None if residual is None else as_rows(residual)
    weight = None if weight is None else weight.contiguous()
    bias = None if bias is None else bias.contiguous()
    n_rows, n_cols = rows.shape
    y = x.new_empty(x.shape)
    s = None if residual is None else x.new_empty(x.shape)
    rstd = x.new_empty(n_rows, dtype=torch.float32)
    mean = x.new_empty(n_rows, dtype=torch.float32) if centered else None
    config = Config.of(n_cols, facts_of(x.device), centered)
    if n_rows:
        launch(
            _norm_fwd,
            (cdiv(n_rows, config.rows),),
            rows,
            r_rows,
            weight,
            bias,
            y,
            s,
            mean,
            rstd,
            rows.stride(0),
            0 if r_rows is None else r_rows.stride(0),
            n_rows,
            options.eps,
            options.offset,
            N=n_cols,
            HAS_RESIDUAL=residual is not None,
            HAS_WEIGHT=weight is not None,
            HAS_BIAS=bias is not None,
            CENTERED=centered,
            ROUND=options.casting_mode == "llama",
            ROWS=config.rows,
            BLOCK=config.block,
            LOOPED=config.looped,
            num_warps=config.warps,
        )
    return y, s, rows, mean, rstd


def norm_backward(
    grad: Tensor,
    rows: Tensor,
    options: Any,
    needs: Needs,
    weight: Tensor | None,
    rstd: Tensor,
    bias: Tensor | None = None,
    mean: Tensor | None = None,
    grad_sum: Tensor | None = None,
) -> Grads:
    """(dx, dw, db) of y as computed by `norm_forward`; `grad_sum` is the gradient of x + residual."""
    needs_dx, needs_dw, needs_db = (*needs, False)[:3]
    weight = None if weight is None else weight.contiguous()
    n_rows, n_cols = rows.shape
    loaded = rows.element_size() + grad.element_size() * (1 if grad_sum is None else 2)
    parameters = ((weight, needs_dw), (bias, needs_db))
    dtypes = [p.dtype for p, need in parameters if need and p is not None]
    config = BackwardConfig.of(n_cols, loaded, len(dtypes), facts_of(rows.device))
    dy = as_rows(grad)
    ds = None if grad_sum is None else as_rows(grad_sum)
    dx = rows.new_empty(grad.shape) if needs_dx else None
    programs = max(1, min(cdiv(n_rows, config.rows), config.programs))
    partial = None
    if dtypes:
        partial = rows.new_empty((len(dtypes), programs, n_cols), dtype=torch.float32)
    strides = (dy.stride(0), 0 if ds is None else ds.stride(0), rows.stride(0))
    run = _backward_by_two if config.two_kernels else _backward_by_one
    run(
        (dy, ds, rows, weight, mean, rstd, dx, partial, *strides, n_rows, options.offset),
        config,
        programs,
        NEEDS_DW=needs_dw,
        NEEDS_DB=needs_db,
        ROUND=options.casting_mode == "llama",
    )
    sums = [] if partial is None else column_sums(partial, dtypes)
    return dx, sums[0] if needs_dw else None, sums[-1] if needs_db else None


Inputs = tuple[Any, ...]  # the run-time arguments of `_norm_bwd`


def _backward_by_one(
    inputs: Inputs, config: BackwardConfig, programs: int, **for_sums: bool
) -> None:
    _, ds, rows, weight, mean, _, dx, *_ = inputs
    launch(
        _norm_bwd,
        (programs,),
        *inputs,
        N=rows.shape[1],
        HAS_DS=ds is not None,
        HAS_WEIGHT=weight is not None,
        CENTERED=mean is not None,
        NEEDS_DX=dx is not None,
        **for_sums,
        ROWS=config.rows,
        BLOCK=config.block,
        STAGES=config.stages,
        RELOAD=config.reload,
        num_warps=config.warps,
    )


def _backward_by_two(
    inputs: Inputs, config: BackwardConfig, programs: int, **for_sums: bool
) -> None:
    dy, ds, rows, weight, mean, rstd, dx, partial, *strides, n_rows, offset = inputs
    n_cols, centered = rows.shape[1], mean is not None
    if dx is not None and n_rows:
        launch(
            _norm_bwd_dx_looped,
            (n_rows,),
            *(dy, ds, rows, weight, mean, rstd, dx, *strides, offset),
            N=n_cols,
            HAS_DS=ds is not None,
            HAS_WEIGHT=weight is not None,
            CENTERED=centered,
            BLOCK=16384,
            num_warps=config.dx_warps,
        )
    if partial is not None:
        launch(
            _norm_bwd_partial_looped,
            (programs, cdiv(n_cols, config.block)),
            *(dy, rows, mean, rstd, partial, strides[0], strides[2], n_rows),
            N=n_cols,
            CENTERED=centered,
            **for_sums,
            ROWS=config.rows,
            BLOCK=config.block,
            STAGES=config.stages,
            num_warps=config.warps,
        )
