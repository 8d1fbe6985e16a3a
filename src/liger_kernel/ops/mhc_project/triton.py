"""Kernels of the normalised projection. Forward moves T K elements, backward 2 T K; the weight stays in the caches."""

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
from liger_kernel.backends import facts_of
from liger_kernel.backends.kernels import column_sums, launch
from liger_kernel.backends.records import SIXTEEN_BITS, DeviceFacts
from liger_kernel.backends.triton import INTERPRET
from liger_kernel.ops.mhc_project.contract import MHCProjectOptions

_END_ROWS = (
    32  # of a program that adds up the parts of the forward: with m = 32, 8 elements in each thread
)


@dataclass(frozen=True)
class Config:
    """Tiles of (rows, k) elements of x. `programs`: how many share the work; the reduced dimension is parted until
    there are as many. Loads in flight are a tile of x and one of the weight, at most 32 columns wide as a rule.
    """

    rows: int
    k: int
    programs: int
    stages: int
    warps: int = 4

    @staticmethod
    @functools.cache
    def forward(facts: DeviceFacts, itemsize: int, m: int) -> Config:
        if _is_rdna(facts):
            return Config.rdna(2 * facts.processors, m)
        # H100, 8192 x 16384: 0.114 ms with three stages, 0.180 with four; a wider weight of fp32, three times in
        # registers, spills where they feed the products (sm_80 to sm_89, sm_120)
        k = 32 if m > 64 and itemsize > 2 else 64
        stages = facts.stages(3, 64 * (k + 32) * itemsize)
        return Config(64, k, 2 * facts.processors, stages, warps=4 if m <= 64 else 8)

    @staticmethod
    @functools.cache
    def dx(facts: DeviceFacts, itemsize: int, m: int) -> Config:
        if _is_rdna(facts):
            return Config.rdna(2 * facts.processors, m)
        # H100, 8192 x 16384 and m = 32: 0.24 ms; of 64 rows 0.34
        k = max(16, min(128, 4096 // m))
        stages = facts.stages(2, 32 * k * itemsize + k * m * 4)
        return Config(32, k, 2 * facts.processors, stages, warps=4 if m <= 64 else 8)

    @staticmethod
    @functools.cache
    def dw(facts: DeviceFacts, itemsize: int, m: int, split: bool) -> Config:
        if _is_rdna(facts):
            return Config.rdna(4 * facts.processors, m)
        if facts.architecture == "hopper" and split and m <= 32:
            # H200, likewise, with dx: 0.76 -> 0.55 ms; of 128 columns 0.69 at best
            stages = facts.stages(3, 64 * (256 + 2 * m) * 4)
            return Config(64, 256, 2 * facts.processors, stages, warps=8)
        # the sums (k, m) stay in registers, twice: 4096 are 32 in each thread, half where fp32 takes as many; `tl.dot`
        # wants 16 columns. H100, likewise: 0.41 ms; of 64 columns 0.76
        widest = 128 if split else 64
        k = min(widest, 32 * widest // m) if m <= 64 else 16
        stages = facts.stages(2, 64 * (k + 2 * m) * max(itemsize, 4))
        return Config(64, k, 4 * facts.processors, stages, warps=4 if m <= 64 else 8)

    @staticmethod
    def rdna(programs: int, m: int) -> Config:
        """Larger tiles spill where no unit multiplies matrices in fp32."""
        return Config(32, 32, programs, 1) if m <= 64 else Config(32, 16, programs, 1, warps=8)

    def parts(self, tiles: int, length: int, step: int) -> int:
        """In how many the reduced dimension is parted, each of four steps or more."""
        return max(1, min(cdiv(self.programs, max(1, tiles)), cdiv(length, 4 * step)))


def _is_rdna(facts: DeviceFacts) -> bool:
    return facts.architecture.startswith("rdna")


#: tiles whose sum is left to tensor cores, which cut off what they add: of 5000 products it was worse than PyTorch's
_SHORT: tl.constexpr = tl.constexpr(8)


@triton.jit
def _rest(wide, part):
    """What `part`, `wide` rounded, leaves over; of an infinity nothing."""
    part = part.to(tl.float32)
    return tl.where(tl.abs(part) == float("inf"), 0.0, wide - part)


@triton.jit
def _split(wide):
    """fp32 as a sum of three bf16: 24 bits, and products of bf16 are exact in fp32."""
    high = wide.to(tl.bfloat16)
    rest = _rest(wide, high)
    middle = rest.to(tl.bfloat16)
    return high, middle, _rest(rest, middle).to(tl.bfloat16)


@triton.jit
def _mhc_project_fwd(
    x_ptr,
    w_ptr,
    raw_ptr,
    squares_ptr,
    x_stride,
    w_k,
    w_m,
    n_rows,
    n_k,
    n_out,
    n_parts,
    NARROW: tl.constexpr,
    X_SPLIT: tl.constexpr,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    K: tl.constexpr,
    M: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Sums of x w and of x^2 over the tiles of K that are `part` modulo the parts. One program owns ROWS tokens."""
    part = tl.program_id(0) % n_parts
    rows = (tl.program_id(0) // n_parts).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    m = tl.arange(0, M)
    raw = tl.zeros((ROWS, M), tl.float32)
    short = tl.zeros((ROWS, M), tl.float32)
    squares = tl.zeros((ROWS, K), tl.float32)
    for tile in tl.range(part, tl.cdiv(n_k, K), n_parts, num_stages=STAGES):
        k = tile * K + tl.arange(0, K)
        mask = (rows < n_rows)[:, None] & (k < n_k)[None, :]
        x = tl.load(x_ptr + rows[:, None] * x_stride + k[None, :], mask=mask, other=0.0)
        at = w_ptr + k.to(tl.int64)[:, None] * w_k + m[None, :] * w_m
        w = tl.load(at, mask=(k < n_k)[:, None] & (m < n_out)[None, :], other=0.0)
        wide = x.to(tl.float32)
        squares += wide * wide
        if X_SPLIT and w_ptr.dtype.element_ty == tl.float32:
            high, middle, low = _split(w)
            short = tl.dot(x, high, tl.dot(x, middle, tl.dot(x, low, short)))
        elif NARROW:
            short = tl.dot(x, w, short)  # products of 16 bits are exact in fp32
        else:
            short = tl.dot(wide, w.to(tl.float32), short, input_precision=PRECISION)
        if (tile // n_parts) % _SHORT == _SHORT - 1:
            raw += short
            short = tl.zeros((ROWS, M), tl.float32)
    raw += short
    first = part.to(tl.int64) * n_rows
    mask = (rows < n_rows)[:, None] & (m < n_out)[None, :]
    tl.store(raw_ptr + (first + rows)[:, None] * n_out + m[None, :], raw, mask=mask)
    tl.store(squares_ptr + first + rows, tl.sum(squares, 1), mask=rows < n_rows)


@triton.jit
def _mhc_project_end(
    raw_ptr,
    squares_ptr,
    y_ptr,
    rstd_ptr,
    n_rows,
    n_k,
    n_out,
    n_parts,
    eps,
    ROWS: tl.constexpr,
    M: tl.constexpr,
):
    """y = rstd sum of raw, rstd = 1 / sqrt(sum of squares / K + eps), over the parts. One program owns ROWS tokens."""
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    m = tl.arange(0, M)
    mask = (rows < n_rows)[:, None] & (m < n_out)[None, :]
    at = rows[:, None] * n_out + m[None, :]
    raw = tl.zeros((ROWS, M), tl.float32)
    squares = tl.zeros((ROWS,), tl.float32)
    for _ in range(0, n_parts):
        raw += tl.load(raw_ptr + at, mask=mask, other=0.0)
        squares += tl.load(squares_ptr + rows, mask=rows < n_rows, other=0.0)
        raw_ptr += n_rows * n_out
        squares_ptr += n_rows
    rstd = 1.0 / tl.sqrt(squares / n_k + eps)
    tl.store(y_ptr + at, raw * rstd[:, None], mask=mask)
    tl.store(rstd_ptr + rows, rstd, mask=rows < n_rows)


@triton.jit
def _mhc_project_dx(
    dy_ptr,
    x_ptr,
    w_ptr,
    y_ptr,
    rstd_ptr,
    dx_ptr,
    dy_stride,
    x_stride,
    w_k,
    w_m,
    n_rows,
    n_k,
    n_out,
    n_parts,
    SPLIT: tl.constexpr,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    K: tl.constexpr,
    M: tl.constexpr,
    STAGES: tl.constexpr,
):
    """With dz = rstd dy: dx = dz w^T - (sum of dy y) rstd^2 / K x. One program owns ROWS tokens, and of their columns
    the tiles that are `part` modulo the parts."""
    part = tl.program_id(0) % n_parts
    rows = (tl.program_id(0) // n_parts).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    m = tl.arange(0, M)
    narrow = (rows < n_rows)[:, None] & (m < n_out)[None, :]
    dy = tl.load(dy_ptr + rows[:, None] * dy_stride + m[None, :], mask=narrow, other=0.0)
    y = tl.load(y_ptr + rows[:, None] * n_out + m[None, :], mask=narrow, other=0.0)
    rstd = tl.load(rstd_ptr + rows, mask=rows < n_rows, other=0.0)
    dz = dy * rstd[:, None]
    along = tl.sum(dz * y, 1) * rstd / n_k
    if SPLIT:
        high, middle, low = _split(dz)
    for tile in tl.range(part, tl.cdiv(n_k, K), n_parts, num_stages=STAGES):
        k = tile * K + tl.arange(0, K)
        mask = (rows < n_rows)[:, None] & (k < n_k)[None, :]
        of_w = w_ptr + k.to(tl.int64)[None, :] * w_k + m[:, None] * w_m
        w = tl.load(of_w, mask=(k < n_k)[None, :] & (m < n_out)[:, None], other=0.0)
        x = tl.load(x_ptr + rows[:, None] * x_stride + k[None, :], mask=mask, other=0.0)
        if SPLIT and w_ptr.dtype.element_ty == tl.float32:
            w_high, w_middle, w_low = _split(w)
            dx = tl.dot(high, w_low, tl.dot(low, w_high, tl.dot(middle, w_middle)))
            dx = tl.dot(high, w_high, tl.dot(high, w_middle, tl.dot(middle, w_high, dx)))
        elif SPLIT:
            dx = tl.dot(high, w, tl.dot(middle, w, tl.dot(low, w)))
        else:
            dx = tl.dot(dz, w.to(tl.float32), input_precision=PRECISION)
        dx -= along[:, None] * x.to(tl.float32)
        to = dx_ptr + rows[:, None] * n_k + k[None, :]
        tl.store(to, dx.to(dx_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _mhc_project_dw(
    dy_ptr,
    x_ptr,
    rstd_ptr,
    partial_ptr,
    dy_stride,
    x_stride,
    n_rows,
    n_k,
    n_out,
    n_parts,
    SPLIT: tl.constexpr,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    K: tl.constexpr,
    M: tl.constexpr,
    STAGES: tl.constexpr,
):
    """dw = x^T (rstd dy). One program owns K columns of the tiles of tokens that are `part` modulo the parts; those of
    the same tokens run together, so that whole rows are read."""
    k_tiles = tl.cdiv(n_k, K)
    part = tl.program_id(0) // k_tiles
    k = (tl.program_id(0) % k_tiles) * K + tl.arange(0, K)
    m = tl.arange(0, M)
    dw = tl.zeros((K, M), tl.float32)
    short = tl.zeros((K, M), tl.float32)
    for tile in tl.range(part, tl.cdiv(n_rows, ROWS), n_parts, num_stages=STAGES):
        rows = tile * ROWS + tl.arange(0, ROWS).to(tl.int64)
        narrow = (rows < n_rows)[:, None] & (m < n_out)[None, :]
        mask = (rows < n_rows)[:, None] & (k < n_k)[None, :]
        x = tl.load(x_ptr + rows[:, None] * x_stride + k[None, :], mask=mask, other=0.0)
        dy = tl.load(dy_ptr + rows[:, None] * dy_stride + m[None, :], mask=narrow, other=0.0)
        dz = dy * tl.load(rstd_ptr + rows, mask=rows < n_rows, other=0.0)[:, None]
        if SPLIT:
            high, middle, low = _split(dz)
            xt = tl.trans(x)
            short = tl.dot(xt, high, tl.dot(xt, middle, tl.dot(xt, low, short)))
        else:
            xt = tl.trans(x.to(tl.float32))
            short = tl.dot(xt, dz, short, input_precision=PRECISION)
        if (tile // n_parts) % _SHORT == _SHORT - 1:
            dw += short
            short = tl.zeros((K, M), tl.float32)
    dw += short
    at = (part.to(tl.int64) * n_k + k[:, None]) * n_out + m[None, :]
    tl.store(partial_ptr + at, dw, mask=(k < n_k)[:, None] & (m < n_out)[None, :])


def forward(
    x: Tensor, weight: Tensor, *, options: MHCProjectOptions, needs: Needs
) -> tuple[Tensor, Saved]:
    rows = as_rows(x)  # (T, K)
    (n_rows, n_k), n_out = rows.shape, weight.shape[1]
    y, rstd = (x.new_empty(s, dtype=torch.float32) for s in ((*x.shape[:-1], n_out), n_rows))
    config = Config.forward(
        facts_of(x.device), max(x.element_size(), weight.element_size()), _padded(n_out)
    )
    tiles = cdiv(n_rows, config.rows)
    if y.numel():
        parts = config.parts(tiles, n_k, config.k)
        raw = y.new_empty(parts, n_rows, n_out)
        squares = y.new_empty(parts, n_rows)
        launch(
            _mhc_project_fwd,
            (tiles * parts,),
            *(rows, weight, raw, squares, rows.stride(0), *weight.stride()),
            *(n_rows, n_k, n_out, parts),
            NARROW=x.dtype == weight.dtype and x.dtype in SIXTEEN_BITS and not INTERPRET,
            X_SPLIT=_splits(x),
            **_tile(config, n_out, x),
        )
        launch(
            _mhc_project_end,
            (cdiv(n_rows, _END_ROWS),),
            *(raw, squares, y, rstd, n_rows, n_k, n_out, parts, options.eps),
            ROWS=_END_ROWS,
            M=next_power_of_2(n_out),
            num_warps=4,
        )
    return y, (rows, weight, y if needs[0] else None, rstd)


def _padded(n_out: int) -> int:
    return max(16, next_power_of_2(n_out))  # the least that `tl.dot` takes


def _splits(x: Tensor) -> bool:
    """Whether products of x with fp32 are taken of its three parts, by tensor cores: exact, for x is bf16."""
    return x.dtype == torch.bfloat16 and not INTERPRET


def _tile(config: Config, n_out: int, x: Tensor) -> dict[str, Any]:
    return {
        "PRECISION": facts_of(x.device).exact_precision,
        "ROWS": config.rows,
        "K": config.k,
        "M": _padded(n_out),
        "STAGES": config.stages,
        "num_warps": config.warps,
    }


def backward(grads: Any, saved: Any, *, options: MHCProjectOptions, needs: Needs) -> Grads:
    rows, weight, y, rstd = saved
    dy = as_rows(grads[0])
    (n_rows, n_k), n_out = rows.shape, weight.shape[1]
    needs_dx, needs_dw = needs
    facts, itemsize, split = facts_of(rows.device), rows.element_size(), _splits(rows)
    dx = dw = None
    # one after the other: together they take so many registers that loads of x are not hidden, which costs more than
    # reading it again
    if needs_dx:
        config = Config.dx(facts, itemsize, _padded(n_out))
        tiles = cdiv(n_rows, config.rows)
        parts = config.parts(tiles, n_k, config.k)
        dx = rows.new_empty(*grads[0].shape[:-1], n_k)
        launch(
            _mhc_project_dx,
            (tiles * parts,),
            *(dy, rows, weight, y, rstd, dx, dy.stride(0), rows.stride(0), *weight.stride()),
            *(n_rows, n_k, n_out, parts),
            SPLIT=split and weight.dtype in (torch.bfloat16, torch.float32),
            **_tile(config, n_out, rows),
        )
    if needs_dw:
        config = Config.dw(facts, itemsize, _padded(n_out), split)
        tiles = cdiv(n_k, config.k)
        parts = config.parts(tiles, n_rows, config.rows)
        partial = dy.new_empty(1, parts, n_k * n_out)
        launch(
            _mhc_project_dw,
            (tiles * parts,),
            *(dy, rows, rstd, partial, dy.stride(0), rows.stride(0), n_rows, n_k, n_out, parts),
            SPLIT=split,
            **_tile(config, n_out, rows),
        )
        dw = column_sums(partial, [weight.dtype])[0].view(n_k, n_out)
    return dx, dw
