"""Dynamic tanh kernels. Forward moves 2 n elements (x in, y out), backward 3 n (dy and x in, dx out)."""

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
from liger_kernel.backends.kernels import column_sums, launch
from liger_kernel.backends.records import DeviceFacts
from liger_kernel.ops.dyt.contract import DyTOptions

STAGES = 3  # of backward


@dataclass(frozen=True)
class Config:
    """Tiles of (rows, cols) elements. In backward, a program walks the tiles of its columns, whose sums it holds.

    Three sums of a tile fill 48 registers of a thread with 16 elements each; the rest is for dy, x and what becomes of
    them. `programs`: of all columns together, one wave.
    """

    rows: int
    cols: int
    programs: int
    warps: int = 4

    @staticmethod
    @functools.cache
    def of(n_cols: int, facts: DeviceFacts) -> Config:
        cols = min(next_power_of_2(n_cols), 1024)  # most hidden sizes are multiples of 512
        programs = max(1, 4 * facts.processors // cdiv(n_cols, cols))
        return Config(2048 // cols, cols, programs)


@triton.jit
def _tanh(u, NARROW: tl.constexpr):
    """Within 2 ulp of every u; near 0 by the polynomial of least squares, as 1 - 2 / (1 + exp(2 u)) cancels there.

    NARROW: where all results have 16 bits, within 3e-6, in half the instructions; arithmetic bounded both kernels.
    """
    v = u * u
    if NARROW:
        far = 1.0 - 2.0 / (1.0 + tl.exp2(2.885390082 * u))
        return tl.where(v < 0.00390625, u - u * v * 0.33333333, far)
    near = -0.006272560
    near = near * v + 0.02107022
    near = near * v - 0.05385186
    near = near * v + 0.1333258
    near = near * v - 0.33333317
    size = tl.abs(u)
    far = 1.0 - 2.0 / (1.0 + tl.exp(2.0 * size))
    return tl.where(size < 0.55, u + u * v * near, tl.where(u < 0.0, -far, far))


@triton.jit
def _dyt_fwd(
    x_ptr,
    alpha_ptr,
    gamma_ptr,
    beta_ptr,
    y_ptr,
    x_stride,
    n_rows,
    n_cols,
    HAS_BETA: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """y = tanh(alpha x) gamma + beta. One program owns one tile."""
    col_tiles = tl.cdiv(n_cols, COLS)
    pid = tl.program_id(0)
    rows = (pid // col_tiles).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    cols = (pid % col_tiles) * COLS + tl.arange(0, COLS)[None, :]
    mask = (rows < n_rows) & (cols < n_cols)
    x = tl.load(x_ptr + rows * x_stride + cols, mask=mask, other=0.0).to(tl.float32)
    gamma = tl.load(gamma_ptr + cols, mask=cols < n_cols, other=0.0).to(tl.float32)
    narrow: tl.constexpr = x_ptr.dtype.element_ty != tl.float32
    y = _tanh(tl.load(alpha_ptr).to(tl.float32) * x, narrow) * gamma
    if HAS_BETA:
        y += tl.load(beta_ptr + cols, mask=cols < n_cols, other=0.0).to(tl.float32)
    tl.store(y_ptr + rows * n_cols + cols, y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _dyt_bwd(
    dy_ptr,
    x_ptr,
    alpha_ptr,
    gamma_ptr,
    dx_ptr,
    partial_ptr,
    dalpha_ptr,
    dy_stride,
    x_stride,
    n_rows,
    n_cols,
    n_programs,
    NEEDS_DX: tl.constexpr,
    NEEDS_DALPHA: tl.constexpr,
    NEEDS_DGAMMA: tl.constexpr,
    NEEDS_DBETA: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    STAGES: tl.constexpr,
):
    """dx = alpha s dy gamma, dalpha = sum of x s dy gamma, and over the rows dgamma = sum of dy t, dbeta = sum of dy,
    with t = tanh(alpha x) and s = 1 - t^2.

    Program (r, c) owns COLS columns of every tile of ROWS rows, r modulo programs: row r of each of the (programs, N)
    tables in partial_ptr, fp32, first dgamma, then dbeta, where they are needed, and one element of dalpha_ptr.
    """
    # gradients of parameters in fp32 are sums that keep what tanh has
    fp32: tl.constexpr = tl.float32
    wide: tl.constexpr = alpha_ptr.dtype.element_ty == fp32 or gamma_ptr.dtype.element_ty == fp32
    narrow: tl.constexpr = not (x_ptr.dtype.element_ty == fp32 or wide)
    pid = tl.program_id(0) % n_programs
    cols = (tl.program_id(0) // n_programs) * COLS + tl.arange(0, COLS)
    alpha = tl.load(alpha_ptr).to(tl.float32)
    gamma = tl.load(gamma_ptr + cols, mask=cols < n_cols, other=0.0).to(tl.float32)[None, :]
    dalpha = tl.zeros((ROWS, COLS), tl.float32)
    dgamma = tl.zeros((ROWS, COLS), tl.float32)
    dbeta = tl.zeros((ROWS, COLS), tl.float32)
    for tile in tl.range(pid, tl.cdiv(n_rows, ROWS), n_programs, num_stages=STAGES):
        rows = tile * ROWS + tl.arange(0, ROWS).to(tl.int64)[:, None]
        mask = (rows < n_rows) & (cols < n_cols)[None, :]
        x = tl.load(x_ptr + rows * x_stride + cols[None, :], mask=mask, other=0.0).to(tl.float32)
        dy = tl.load(dy_ptr + rows * dy_stride + cols[None, :], mask=mask, other=0.0)
        dy = dy.to(tl.float32)
        t = _tanh(alpha * x, narrow)
        slope = dy * gamma * (1.0 - t * t)
        if NEEDS_DX:
            dx = (alpha * slope).to(dx_ptr.dtype.element_ty)
            tl.store(dx_ptr + rows * n_cols + cols[None, :], dx, mask=mask)
        if NEEDS_DALPHA:
            dalpha += x * slope
        if NEEDS_DGAMMA:
            dgamma += dy * t
        if NEEDS_DBETA:
            dbeta += dy
    if NEEDS_DALPHA:
        tl.store(dalpha_ptr + tl.program_id(0), tl.sum(tl.sum(dalpha, 1), 0))
    if NEEDS_DGAMMA:
        tl.store(partial_ptr + pid * n_cols + cols, tl.sum(dgamma, 0), mask=cols < n_cols)
        partial_ptr += n_programs * n_cols
    if NEEDS_DBETA:
        tl.store(partial_ptr + pid * n_cols + cols, tl.sum(dbeta, 0), mask=cols < n_cols)


def forward(
    x: Tensor,
    alpha: Tensor,
    gamma: Tensor,
    beta: Tensor | None,
    *,
    options: DyTOptions,
    needs: Needs,
) -> tuple[Tensor, Saved]:
    rows = as_rows(x)  # (R, N)
    gamma = gamma.contiguous()
    y = x.new_empty(x.shape)
    n_rows, n_cols = rows.shape
    config = Config.of(n_cols, facts_of(x.device))
    if y.numel():
        launch(
            _dyt_fwd,
            (cdiv(n_rows, config.rows) * cdiv(n_cols, config.cols),),
            *(rows, alpha, gamma, None if beta is None else beta.contiguous(), y),
            *(rows.stride(0), n_rows, n_cols),
            HAS_BETA=beta is not None,
            ROWS=config.rows,
            COLS=config.cols,
            num_warps=config.warps,
        )
    return y, (rows, alpha, gamma, beta if needs[3] else None)


def backward(grads: Grads, saved: Saved, *, options: DyTOptions, needs: Needs) -> Grads:
    rows, alpha, gamma, beta = saved
    needs_dx, needs_dalpha, needs_dgamma, needs_dbeta = needs
    n_rows, n_cols = rows.shape
    facts = facts_of(rows.device)
    config = Config.of(n_cols, facts)
    dy = as_rows(grads[0])
    dx = rows.new_empty(grads[0].shape) if needs_dx else None
    programs = max(1, min(cdiv(n_rows, config.rows), config.programs))
    grid = (programs * cdiv(n_cols, config.cols),)  # the second axis ends at 65,535
    dtypes = [p.dtype for p, need in ((gamma, needs_dgamma), (beta, needs_dbeta)) if need]
    partial = dy.new_empty((len(dtypes), programs, n_cols), dtype=torch.float32) if dtypes else None
    dalpha = dy.new_empty((1, *grid, 1), dtype=torch.float32) if needs_dalpha else None
    loaded = config.rows * config.cols * (rows.element_size() + dy.element_size())
    launch(
        _dyt_bwd,
        grid,
        *(dy, rows, alpha, gamma, dx, partial, dalpha),
        *(dy.stride(0), rows.stride(0), n_rows, n_cols, programs),
        NEEDS_DX=needs_dx,
        NEEDS_DALPHA=needs_dalpha,
        NEEDS_DGAMMA=needs_dgamma,
        NEEDS_DBETA=needs_dbeta,
        ROWS=config.rows,
        COLS=config.cols,
        STAGES=facts.stages(STAGES, loaded),
        num_warps=config.warps,
    )
    sums = [] if partial is None else column_sums(partial, dtypes)
    return (
        dx,
        None if dalpha is None else column_sums(dalpha, [alpha.dtype])[0].view(alpha.shape),
        sums[0] if needs_dgamma else None,
        sums[-1] if needs_dbeta else None,
    )
