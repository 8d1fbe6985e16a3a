"""GroupNorm kernels. Forward moves 2 n elements (x in, y out), backward 3 n (dy and x in, dx out).

A group is walked in tiles of (channels, positions), twice: the second time from the last tile on, from the L2.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from liger_kernel._core.contract import Grads, Needs, Saved
from liger_kernel._core.shapes import next_power_of_2
from liger_kernel.backends import facts_of
from liger_kernel.backends.kernels import column_sums, launch
from liger_kernel.backends.records import DeviceFacts
from liger_kernel.ops.group_norm.contract import GroupNormOptions

STAGES = 3  # tiles in flight
#: positions that a warp reads of a channel at once: sums over them need no other warp
OF_WARP = 256
LEAST = 1024  # elements of a tile


@dataclass(frozen=True)
class Config:
    """Tiles of (channels, block): no channel is there in vain, and where there are few, more of their positions are."""

    channels: int
    block: int
    warps: int
    stages: int

    @staticmethod
    @functools.cache
    def of(channels: int, size: int, bytes_per_element: int, facts: DeviceFacts) -> Config:
        """Of groups of `channels`, each of `size` positions."""
        # Groups of 128 KB want few programs, whose groups together fit the L2. H200, 32x512x4096: 0.094 and
        # 0.146 ms, with tiles of 4096 0.097 and 0.153; 64x1280x16x16: 0.032 and 0.047, with 4096 0.049 and 0.064
        tile, of_warp = (8192, 1024) if channels * size >= 2**16 else (2048, 512)
        most = next_power_of_2(size)
        whole = channels & -channels  # the largest power of 2 that divides it
        block = min(most, max(OF_WARP, tile // whole))
        rows = min(whole if whole * block >= LEAST else next_power_of_2(channels), tile // block)
        warps = max(1, rows * block // of_warp)
        return Config(rows, block, warps, facts.stages(STAGES, rows * block * bytes_per_element))


@triton.jit
def _tile(t, n_channels, size, CHANNELS: tl.constexpr, BLOCK: tl.constexpr):
    """Channels of tile t of a group, its offsets (CHANNELS, BLOCK) from the start of the group, and its mask."""
    n_blocks = tl.cdiv(size, BLOCK)
    channels = (t // n_blocks) * CHANNELS + tl.arange(0, CHANNELS)
    at = (t % n_blocks) * BLOCK + tl.arange(0, BLOCK)[None, :]
    mask = (channels < n_channels)[:, None] & (at < size)
    return channels, (channels.to(tl.int64) * size)[:, None] + at, mask


@triton.jit
def _affine(n, w_ptr, b_ptr, channels, inside, HAS_WEIGHT: tl.constexpr, HAS_BIAS: tl.constexpr):
    """n w + b"""
    if HAS_WEIGHT:
        n *= tl.load(w_ptr + channels, mask=inside, other=0.0).to(tl.float32)[:, None]
    if HAS_BIAS:
        n += tl.load(b_ptr + channels, mask=inside, other=0.0).to(tl.float32)[:, None]
    return n


@triton.jit
def _group_norm_fwd(
    x_ptr,
    w_ptr,
    b_ptr,
    y_ptr,
    mean_ptr,
    rstd_ptr,
    n_groups,
    n_channels,
    size,
    eps,
    HAS_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    CHANNELS: tl.constexpr,
    BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
):
    """y = (x - mean) rstd w + b. One program owns a group of `n_channels` channels, each of `size` positions.

    The variance is that of x less the mean of the first tile, in one pass. That mean is as far from the mean as the
    deviations are, unless the tile is an outlier in a large group, and so the squares do not cancel.
    """
    group = tl.program_id(0).to(tl.int64)
    x_ptr += group * n_channels * size
    y_ptr += group * n_channels * size
    first_channel = (group % n_groups).to(tl.int32) * n_channels
    n_elements = 1.0 * n_channels * size
    _, at, mask = _tile(0, n_channels, size, CHANNELS, BLOCK)
    first = tl.load(x_ptr + at, mask=mask, other=0.0).to(tl.float32)
    shift = tl.sum(tl.sum(first, 1), 0) / tl.sum(tl.sum(mask.to(tl.float32), 1), 0)
    total = tl.zeros((CHANNELS, BLOCK), tl.float32)
    squares = tl.zeros((CHANNELS, BLOCK), tl.float32)
    tiles = tl.cdiv(n_channels, CHANNELS) * tl.cdiv(size, BLOCK)
    for t in tl.range(0, tiles, num_stages=STAGES):
        _, at, mask = _tile(t, n_channels, size, CHANNELS, BLOCK)
        x = tl.load(x_ptr + at, mask=mask, other=0.0).to(tl.float32)
        x = tl.where(mask, x - shift, 0.0)
        total += x
        squares += x * x
    mean = tl.sum(tl.sum(total, 1), 0) / n_elements
    variance = tl.sum(tl.sum(squares, 1), 0) / n_elements - mean * mean
    rstd = tl.rsqrt(tl.maximum(variance, 0.0) + eps)
    tl.store(mean_ptr + group, shift + mean)
    tl.store(rstd_ptr + group, rstd)
    if HAS_WEIGHT:
        w_ptr += first_channel
    if HAS_BIAS:
        b_ptr += first_channel
    for back in tl.range(1, tiles + 1, num_stages=STAGES):
        channels, at, mask = _tile(tiles - back, n_channels, size, CHANNELS, BLOCK)
        x = tl.load(x_ptr + at, mask=mask, other=0.0, eviction_policy="evict_first")
        y = (x.to(tl.float32) - shift - mean) * rstd
        y = _affine(y, w_ptr, b_ptr, channels, channels < n_channels, HAS_WEIGHT, HAS_BIAS)
        tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _load_tile(dy_ptr, x_ptr, at, mask, mean, rstd):
    """(x - mean) rstd and dy; outside the mask the first is whatever: every use multiplies it with a dy of zero."""
    x = tl.load(x_ptr + at, mask=mask, other=0.0).to(tl.float32)
    dy = tl.load(dy_ptr + at, mask=mask, other=0.0).to(tl.float32)
    return (x - mean) * rstd, dy


@triton.jit
def _weights(w_ptr, channels, inside, HAS_WEIGHT: tl.constexpr):
    if HAS_WEIGHT:
        return tl.load(w_ptr + channels, mask=inside, other=0.0).to(tl.float32)
    else:
        return tl.full(channels.shape, 1.0, tl.float32)


@triton.jit
def _group_norm_bwd(
    dy_ptr,
    x_ptr,
    w_ptr,
    mean_ptr,
    rstd_ptr,
    dx_ptr,
    partial_ptr,
    n_groups,
    n_channels,
    size,
    sum_stride,
    HAS_WEIGHT: tl.constexpr,
    NEEDS_DX: tl.constexpr,
    NEEDS_DW: tl.constexpr,
    NEEDS_DB: tl.constexpr,
    CHANNELS: tl.constexpr,
    BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
):
    """dx = rstd (m - n mean(m n) - mean(m)), dw = sum of dy n, db = sum of dy, with n = (x - mean) rstd and m = dy w.

    One program owns one group: in the tables of partial_ptr, (batch, C), fp32, first dw, then db, where they are
    needed, the row of its entry of the batch, and of it the columns of its channels.
    """
    group = tl.program_id(0).to(tl.int64)
    dy_ptr += group * n_channels * size
    x_ptr += group * n_channels * size
    if HAS_WEIGHT:
        w_ptr += (group % n_groups).to(tl.int32) * n_channels
    mean = tl.load(mean_ptr + group)
    rstd = tl.load(rstd_ptr + group)
    n_blocks = tl.cdiv(size, BLOCK)
    tiles = tl.cdiv(n_channels, CHANNELS) * n_blocks
    products = tl.zeros((CHANNELS, BLOCK), tl.float32)
    total = tl.zeros((CHANNELS, BLOCK), tl.float32)
    of_products = tl.zeros((CHANNELS,), tl.float32)
    of_m = tl.zeros((CHANNELS,), tl.float32)
    for t in tl.range(0, tiles, num_stages=STAGES):
        channels, at, mask = _tile(t, n_channels, size, CHANNELS, BLOCK)
        n, dy = _load_tile(dy_ptr, x_ptr, at, mask, mean, rstd)
        products += dy * n
        total += dy
        if t % n_blocks == n_blocks - 1:  # the end of these channels
            dw = tl.sum(products, 1)
            db = tl.sum(total, 1)
            inside = channels < n_channels
            sums_at = group * n_channels + channels
            if NEEDS_DW:
                tl.store(partial_ptr + sums_at, dw, mask=inside)
            if NEEDS_DB:
                tl.store(partial_ptr + (sum_stride if NEEDS_DW else 0) + sums_at, db, mask=inside)
            w = _weights(w_ptr, channels, inside, HAS_WEIGHT)
            of_products += w * dw
            of_m += w * db
            products = tl.zeros((CHANNELS, BLOCK), tl.float32)
            total = tl.zeros((CHANNELS, BLOCK), tl.float32)
    if NEEDS_DX:
        dx_ptr += group * n_channels * size
        n_elements = 1.0 * n_channels * size
        mean_product = tl.sum(of_products, 0) / n_elements
        mean_m = tl.sum(of_m, 0) / n_elements
        for back in tl.range(1, tiles + 1, num_stages=STAGES):
            channels, at, mask = _tile(tiles - back, n_channels, size, CHANNELS, BLOCK)
            n, dy = _load_tile(dy_ptr, x_ptr, at, mask, mean, rstd)
            w = _weights(w_ptr, channels, channels < n_channels, HAS_WEIGHT)
            dx = rstd * (dy * w[:, None] - n * mean_product - mean_m)
            tl.store(dx_ptr + at, dx.to(dx_ptr.dtype.element_ty), mask=mask)


def forward(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    *,
    options: GroupNormOptions,
    needs: Needs,
) -> tuple[Tensor, Saved]:
    x = x.contiguous()
    weight = None if weight is None else weight.contiguous()
    bias = None if bias is None else bias.contiguous()
    y = torch.empty_like(x)
    mean, rstd = (
        x.new_empty((x.shape[0], options.num_groups), dtype=torch.float32) for _ in range(2)
    )
    if x.numel():
        config, sizes = _plan(x, options.num_groups, x.element_size())
        launch(
            _group_norm_fwd,
            (mean.numel(),),
            *(x, weight, bias, y, mean, rstd, *sizes, options.eps),
            HAS_WEIGHT=weight is not None,
            HAS_BIAS=bias is not None,
            CHANNELS=config.channels,
            BLOCK=config.block,
            STAGES=config.stages,
            num_warps=config.warps,
        )
    return y, (x, weight, bias, mean, rstd)


def backward(grads: Grads, saved: Saved, *, options: GroupNormOptions, needs: Needs) -> Grads:
    x, weight, bias, mean, rstd = saved
    needs_dx, needs_dw, needs_db = needs
    dy = grads[0].contiguous()
    dx = torch.empty_like(x) if needs_dx else None
    dtypes = [p.dtype for p, need in ((weight, needs_dw), (bias, needs_db)) if need]
    loaded = x.element_size() + dy.element_size()
    config, sizes = _plan(x, options.num_groups, loaded)
    shape = (len(dtypes), *x.shape[:2])
    partial = x.new_empty(shape, dtype=torch.float32) if dtypes else None
    if x.numel():
        launch(
            _group_norm_bwd,
            (mean.numel(),),
            *(dy, x, weight, mean, rstd, dx, partial, *sizes, x.shape[0] * x.shape[1]),
            HAS_WEIGHT=weight is not None,
            NEEDS_DX=needs_dx,
            NEEDS_DW=needs_dw,
            NEEDS_DB=needs_db,
            CHANNELS=config.channels,
            BLOCK=config.block,
            STAGES=config.stages,
            num_warps=config.warps,
        )
    sums = [] if partial is None else column_sums(partial, dtypes)
    return dx, sums[0] if needs_dw else None, sums[-1] if needs_db else None


def _plan(x: Tensor, groups: int, bytes_per_element: int) -> tuple[Config, tuple[int, int, int]]:
    """The tiles, and the numbers of groups, of channels of each, and of positions of a channel."""
    channels, size = x.shape[1] // groups, x.shape[2:].numel()
    config = Config.of(channels, size, bytes_per_element, facts_of(x.device))
    return config, (groups, channels, size)
