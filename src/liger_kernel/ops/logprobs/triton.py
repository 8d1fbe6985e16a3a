"""Log-probability kernels. The numbers of a row take one pass over its logits; a gradient reads them a second time, by
and large from the L2 cache, and is written once."""

from __future__ import annotations

import math

import triton
import triton.language as tl
from torch import Tensor, ones_like

from liger_kernel._core.shapes import next_power_of_2
from liger_kernel.backends.kernels import launch
from liger_kernel.backends.triton import INTERPRET
from liger_kernel.ops.cross_entropy.triton import (
    _FAR,
    _VECTOR,
    Config,
    _no_gradient,
    _tanh,
    tile,
)
from liger_kernel.ops.logprobs.contract import LogProbRows, LogProbsOptions


@triton.jit
def _scaled(x, inner, outer, HAS_SOFTCAP: tl.constexpr, EXACT: tl.constexpr):
    """z = outer tanh(inner x), and the tanh; without a soft-cap z = outer x."""
    t = x
    if HAS_SOFTCAP:
        t = _tanh(x * inner, EXACT)
    return outer * t, t


_EXACT_EXP = tl.constexpr(INTERPRET)  # NumPy's is, and has no fma


@triton.jit
def _exp(x):
    """exp(x) of x <= 0 to the last digit also where it is tiny: `tl.exp` rounds x / log 2, which is large there."""
    if _EXACT_EXP:
        return tl.exp(x)
    x = tl.where(x < -200.0, -200.0, x)  # 0, and NaN stays; of -inf the rest would be NaN
    whole = x * 1.4426950408889634
    rest = tl.fma(x, 1.4426950408889634, -whole) + x * 1.925963033500011e-08  # at most 2e-5
    e = tl.exp2(whole)
    return tl.fma(e, rest * 0.6931471805599453, e)


@triton.jit
def _statistics(
    x_row,
    n_cols,
    n_read,
    inner,
    outer,
    PADDED: tl.constexpr,
    WEIGHTED: tl.constexpr,
    SQUARES: tl.constexpr,
    SUM: tl.constexpr,
    BEST: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    EXACT: tl.constexpr,
    BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Of a row: the largest z, the sums of e = exp(z - largest), of e (z - largest), e^2 and z, and the first largest.

    What is not asked for stays 0.
    """
    cols = tl.arange(0, BLOCK)
    top = float("-inf")
    total = 0.0
    weighted = 0.0
    squares = 0.0
    summed = 0.0
    best = 0
    for start in tl.range(0, n_read, BLOCK, num_stages=STAGES):
        inside = start + cols < n_read
        x = tl.load(x_row + start + cols, mask=inside, other=0.0, eviction_policy="evict_last").to(
            tl.float32
        )
        mask = start + cols < n_cols if PADDED else inside
        z, _ = _scaled(x, inner, outer, HAS_SOFTCAP, EXACT)
        if SUM:
            summed += tl.sum(tl.where(mask, z, 0.0), 0)
        z = tl.where(mask, z, float("-inf"))
        block_top = tl.max(z, 0)
        if BEST:
            first = tl.min(tl.where(z == block_top, start + cols, n_cols), 0)
            best = tl.where(block_top > top, first, best)
        new_top = tl.maximum(top, block_top)
        # as long as every logit is -inf (classes that are masked out), exp(z - top) would be NaN
        anchor = tl.where(new_top == float("-inf"), 0.0, new_top)
        # the entropy of a row that is certain is made of tiny terms alone
        e = _exp(z - anchor) if WEIGHTED else tl.exp(z - anchor)
        shrink = tl.exp(top - anchor)
        if WEIGHTED:
            below = tl.where(z == float("-inf"), 0.0, z - anchor)
            moved = tl.where(top == float("-inf"), 0.0, top - anchor)
            weighted = (weighted + moved * total) * shrink + tl.sum(e * below, 0)
        if SQUARES:
            squares = squares * shrink * shrink + tl.sum(e * e, 0)
        total = total * shrink + tl.sum(e, 0)
        top = new_top
    return top, total, weighted, squares, summed, best


@triton.jit
def _slope(
    below, a, b, c, mean, t, z_slope, ENTROPY: tl.constexpr, SUM_P2: tl.constexpr, HAS_SOFTCAP: tl.constexpr
):  # fmt: skip
    """The gradient of logits, e (a + b (z - largest) + c e) + mean, times dz/dx; `below` is z - largest."""
    e = tl.exp(below)
    by = a
    if ENTROPY:
        by += b * tl.where(below == float("-inf"), 0.0, below)
    if SUM_P2:
        by += c * e
    g = (e * by + mean) * z_slope
    if HAS_SOFTCAP:
        g *= 1.0 - t * t
    return g


@triton.jit
def _gradient(
    x_row, grad_row, label, is_here, z_y, t_y, top, a, b, c, mean, own, n_cols, n_read, inner, outer, slope,
    PADDED: tl.constexpr, ENTROPY: tl.constexpr, SUM_P2: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
    EXACT: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """`_slope` of a row, and `own` more for the label; `is_here`: None, or a mask."""
    cols = tl.arange(0, BLOCK)
    n_blocks = tl.cdiv(n_read, BLOCK)
    for i in tl.range(0, n_blocks, num_stages=STAGES):
        # last block first: it is the one most likely still in the cache
        start = (n_blocks - 1 - i) * BLOCK
        inside = start + cols < n_read
        x = tl.load(x_row + start + cols, mask=inside, other=0.0, eviction_policy="evict_first").to(
            tl.float32
        )
        z, t = _scaled(x, inner, outer, HAS_SOFTCAP, EXACT)
        g = _slope(z - top, a, b, c, mean, t, slope, ENTROPY, SUM_P2, HAS_SOFTCAP)
        g = g.to(grad_row.dtype.element_ty)
        tl.store(grad_row + start + cols, g, mask=inside, eviction_policy="evict_first")
    # the label's class again, with what only it has; a select for each class of the row would cost more
    g = _slope(z_y - top, a, b, c, mean, t_y, slope, ENTROPY, SUM_P2, HAS_SOFTCAP)
    own *= slope
    if HAS_SOFTCAP:
        own *= 1.0 - t_y * t_y
    tl.debug_barrier()
    tl.store(grad_row + label, (g + own).to(grad_row.dtype.element_ty), mask=is_here)
    if PADDED:
        beyond = n_cols + tl.arange(0, _VECTOR)
        none = tl.zeros((_VECTOR,), tl.float32).to(grad_row.dtype.element_ty)
        tl.store(grad_row + beyond, none, mask=beyond < n_read)


@triton.jit
def _logprobs(
    x_ptr,
    grad_ptr,
    ids_ptr,
    temperature_ptr,
    numbers_ptr,
    top1_ptr,
    lse_ptr,
    row_scale_ptr,
    x_stride,
    grad_stride,
    n_cols,
    ignore_index,
    inner,
    outer,
    slope,
    most_entropy,
    PADDED: tl.constexpr,
    COLUMNS: tl.constexpr,
    ENTROPY: tl.constexpr,
    LOGSUMEXP: tl.constexpr,
    SUM_P2: tl.constexpr,
    MEAN_LOGIT: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_TEMPERATURE: tl.constexpr,
    WRITE_TOP1: tl.constexpr,
    WRITE_LSE: tl.constexpr,
    WRITE_GRAD: tl.constexpr,
    BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Numbers and gradient of one row (formulas: `contract.py`); grad_ptr may be x_ptr. One program owns one row.

    ENTROPY and the like are the columns of these numbers among COLUMNS, and 0 where they are not asked for; column 0 is
    the log-probability. z = outer tanh(inner x), or outer x; dz/dx = slope (1 - tanh^2). For PADDED see the kernel of
    cross entropy.
    """
    EXACT: tl.constexpr = x_ptr.dtype.element_ty == tl.float32
    row = tl.program_id(0).to(tl.int64)
    y = tl.load(ids_ptr + row)
    x_row = x_ptr + row * x_stride
    numbers = numbers_ptr + row * COLUMNS
    n_read = tl.cdiv(n_cols, _VECTOR) * _VECTOR if PADDED else n_cols
    grad_row = grad_ptr
    if WRITE_GRAD:
        grad_row = grad_ptr + row * grad_stride

    if y == ignore_index:
        for i in tl.static_range(COLUMNS):
            tl.store(numbers + i, 0.0)
        if WRITE_TOP1:
            tl.store(top1_ptr + row, False)
        if WRITE_LSE:
            tl.store(lse_ptr + row, 0.0)
        if WRITE_GRAD:
            _no_gradient(grad_row, n_cols, BLOCK)
        return

    if HAS_TEMPERATURE:
        tau = tl.load(temperature_ptr + row).to(tl.float32)
        outer = outer / tau
        slope = slope / tau
    # A label out of range reads class 0 and makes log-probability and gradient NaN.
    in_range = (y >= 0) & (y < n_cols)
    label = tl.where(in_range, y, 0)
    z_y, t_y = _scaled(tl.load(x_row + label).to(tl.float32), inner, outer, HAS_SOFTCAP, EXACT)
    top, total, weighted, squares, summed, best = _statistics(
        x_row, n_cols, n_read, inner, outer, PADDED, ENTROPY > 0, SUM_P2 > 0, MEAN_LOGIT > 0, WRITE_TOP1,
        HAS_SOFTCAP, EXACT, BLOCK, STAGES,
    )  # fmt: skip
    log_total = tl.log(total)
    lse = top + log_total
    # beside a top as far from 0 as that of classes that are all masked, lse would lose the logarithm of the sum
    log_prob = tl.where(tl.abs(top) < _FAR, z_y - lse, (z_y - top) - log_total)
    log_prob = tl.where(log_prob > 0.0, 0.0, log_prob)
    tl.store(numbers, tl.where(in_range, log_prob, float("nan")))
    if ENTROPY:
        entropy = log_total - weighted / total
        tl.store(numbers + ENTROPY, tl.where(entropy > most_entropy, most_entropy, entropy))
    if LOGSUMEXP:
        tl.store(numbers + LOGSUMEXP, lse)
    if SUM_P2:
        tl.store(numbers + SUM_P2, squares / total / total)
    if MEAN_LOGIT:
        tl.store(numbers + MEAN_LOGIT, summed / n_cols)
    if WRITE_TOP1:
        tl.store(top1_ptr + row, best == y)
    if WRITE_LSE:
        tl.store(lse_ptr + row, lse)

    if WRITE_GRAD:
        scales = row_scale_ptr + row * COLUMNS
        g_label = tl.load(scales).to(tl.float32)
        a = -g_label
        b = 0.0
        c = 0.0
        mean = 0.0
        if LOGSUMEXP:
            a += tl.load(scales + LOGSUMEXP).to(tl.float32)
        if ENTROPY:
            # log p + H = (z - top) - its mean under p
            g_entropy = tl.load(scales + ENTROPY).to(tl.float32)
            a += g_entropy * (weighted / total)
            b = -g_entropy / total
        if SUM_P2:
            g_squares = 2.0 * tl.load(scales + SUM_P2).to(tl.float32)
            a -= g_squares * (squares / total / total)
            c = g_squares / total / total
        if MEAN_LOGIT:
            mean = tl.load(scales + MEAN_LOGIT).to(tl.float32) / n_cols
        # exp(z - top) / total keeps digits that exp(z - lse) loses where lse is large
        a = tl.where(in_range, a / total, float("nan"))
        _gradient(
            x_row, grad_row, label, None, z_y, t_y, top, a, b, c, mean, g_label, n_cols, n_read, inner, outer, slope,
            PADDED, ENTROPY > 0, SUM_P2 > 0, HAS_SOFTCAP, EXACT, BLOCK, STAGES,
        )  # fmt: skip


@triton.jit
def _shard_statistics(
    x_ptr,
    ids_ptr,
    temperature_ptr,
    out_ptr,
    x_stride,
    n_rows,
    n_cols,
    first,
    ignore_index,
    inner,
    outer,
    PADDED: tl.constexpr,
    ENTROPY: tl.constexpr,
    SUM_P2: tl.constexpr,
    MEAN_LOGIT: tl.constexpr,
    BEST: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_TEMPERATURE: tl.constexpr,
    BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
):
    """A row of some classes, from `first` on: see `contract.Kernels.statistics`. One program owns one row."""
    EXACT: tl.constexpr = x_ptr.dtype.element_ty == tl.float32
    row = tl.program_id(0).to(tl.int64)
    y = tl.load(ids_ptr + row)
    if y == ignore_index:
        return
    if HAS_TEMPERATURE:
        outer = outer / tl.load(temperature_ptr + row).to(tl.float32)
    x_row = x_ptr + row * x_stride
    n_read = tl.cdiv(n_cols, _VECTOR) * _VECTOR if PADDED else n_cols
    label = y - first
    x_y = tl.load(x_row + label, mask=(label >= 0) & (label < n_cols), other=0.0).to(tl.float32)
    z_y, _ = _scaled(x_y, inner, outer, HAS_SOFTCAP, EXACT)
    top, total, weighted, squares, summed, best = _statistics(
        x_row, n_cols, n_read, inner, outer, PADDED, ENTROPY, SUM_P2, MEAN_LOGIT, BEST, HAS_SOFTCAP, EXACT, BLOCK,
        STAGES,
    )  # fmt: skip
    out = out_ptr + row
    step = tl.cast(n_rows, tl.int64)
    tl.store(out, top)
    tl.store(out + step, total)
    tl.store(out + 2 * step, z_y)
    tl.store(out + 3 * step, summed)
    tl.store(out + 4 * step, (best + first).to(tl.float32))
    tl.store(out + 5 * step, weighted)
    tl.store(out + 6 * step, squares)


@triton.jit
def _shard_gradient(
    x_ptr,
    ids_ptr,
    temperature_ptr,
    factors_ptr,
    grad_ptr,
    x_stride,
    grad_stride,
    n_rows,
    n_cols,
    first,
    ignore_index,
    inner,
    outer,
    slope,
    PADDED: tl.constexpr,
    ENTROPY: tl.constexpr,
    SUM_P2: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_TEMPERATURE: tl.constexpr,
    BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
):
    """The gradient of a row of some classes: see `contract.Kernels.gradient`. One program owns one row."""
    EXACT: tl.constexpr = x_ptr.dtype.element_ty == tl.float32
    row = tl.program_id(0).to(tl.int64)
    y = tl.load(ids_ptr + row)
    x_row = x_ptr + row * x_stride
    grad_row = grad_ptr + row * grad_stride
    if y == ignore_index:
        _no_gradient(grad_row, n_cols, BLOCK)
        return
    if HAS_TEMPERATURE:
        tau = tl.load(temperature_ptr + row).to(tl.float32)
        outer = outer / tau
        slope = slope / tau
    n_read = tl.cdiv(n_cols, _VECTOR) * _VECTOR if PADDED else n_cols
    label = y - first
    is_here = (label >= 0) & (label < n_cols)
    label = tl.where(is_here, label, 0)
    z_y, t_y = _scaled(tl.load(x_row + label).to(tl.float32), inner, outer, HAS_SOFTCAP, EXACT)
    f = factors_ptr + row
    step = tl.cast(n_rows, tl.int64)
    _gradient(
        x_row, grad_row, label, is_here, z_y, t_y, tl.load(f), tl.load(f + step), tl.load(f + 2 * step),
        tl.load(f + 3 * step), tl.load(f + 4 * step), tl.load(f + 5 * step), n_cols, n_read, inner, outer, slope,
        PADDED, ENTROPY, SUM_P2, HAS_SOFTCAP, EXACT, BLOCK, STAGES,
    )  # fmt: skip


def step(
    logits: Tensor,
    ids: Tensor,
    temperature: Tensor | None,
    *,
    options: LogProbsOptions,
    out: LogProbRows,
    lse: Tensor | None,
    grad: Tensor | None,
    row_scale: Tensor | None,
    padded: bool,
) -> None:
    o, numbers, is_top1 = options, out.loss, out.columns[1]
    n_rows, n_cols = logits.shape
    if not n_rows:
        return
    if grad is not None and row_scale is None:
        row_scale = ones_like(numbers)
    config, pads = tile(logits, o.softcap, padded)
    column = {name: i for i, name in enumerate(o.numbers)}
    launch(
        _logprobs,
        (n_rows,),
        logits,
        grad,
        ids,
        temperature,
        numbers,
        is_top1,
        lse,
        row_scale,
        logits.stride(0),
        0 if grad is None else grad.stride(0),
        n_cols,
        o.ignore_index,
        *_numbers(o),
        math.log(n_cols) * (1 - 2**-23),  # a sum rounds to more than there can be
        PADDED=pads,
        COLUMNS=len(column),
        ENTROPY=column.get("entropy", 0),
        LOGSUMEXP=column.get("logsumexp", 0),
        SUM_P2=column.get("sum_p2", 0),
        MEAN_LOGIT=column.get("mean_logit", 0),
        HAS_SOFTCAP=o.softcap is not None,
        HAS_TEMPERATURE=temperature is not None,
        WRITE_TOP1=is_top1 is not None,
        WRITE_LSE=lse is not None,
        WRITE_GRAD=grad is not None,
        BLOCK=config.block,
        STAGES=config.stages,
        num_warps=config.warps,
    )


def _numbers(o: LogProbsOptions) -> tuple[float, float, float]:
    """inner, outer and slope: z = outer tanh(inner x), or outer x; dz/dx = slope (1 - tanh^2)."""
    cap = o.softcap or 1.0
    outer = (o.scale if o.softcap is None else cap) / o.temperature
    return o.scale / cap, outer, o.scale / o.temperature


def _once(logits: Tensor, padded: bool) -> tuple[Config, bool]:
    """`tile` for a kernel that reads a row once: small blocks, of which little lies beyond the end of a row."""
    pads = tile(logits, None, padded)[1]
    block = min(next_power_of_2(logits.shape[1]), 4096)
    return Config(block, max(4, block // 512), stages=1), pads


def statistics(
    logits: Tensor,
    ids: Tensor,
    temperature: Tensor | None,
    *,
    first: int,
    options: LogProbsOptions,
    out: Tensor,
    padded: bool,
) -> None:
    o, (n_rows, n_cols) = options, logits.shape
    if not n_rows:
        return
    config, pads = _once(logits, padded)
    launch(
        _shard_statistics,
        (n_rows,),
        logits,
        ids,
        temperature,
        out,
        logits.stride(0),
        n_rows,
        n_cols,
        first,
        o.ignore_index,
        *_numbers(o)[:2],
        PADDED=pads,
        ENTROPY=o.entropy,
        SUM_P2=o.sum_p2,
        MEAN_LOGIT=o.mean_logit,
        BEST=o.top1,
        HAS_SOFTCAP=o.softcap is not None,
        HAS_TEMPERATURE=temperature is not None,
        BLOCK=config.block,
        STAGES=config.stages,
        num_warps=config.warps,
    )


def gradient(
    logits: Tensor,
    ids: Tensor,
    temperature: Tensor | None,
    factors: Tensor,
    *,
    first: int,
    options: LogProbsOptions,
    grad: Tensor,
    padded: bool,
) -> None:
    o, (n_rows, n_cols) = options, logits.shape
    if not n_rows:
        return
    config, pads = _once(logits, padded)
    launch(
        _shard_gradient,
        (n_rows,),
        logits,
        ids,
        temperature,
        factors,
        grad,
        logits.stride(0),
        grad.stride(0),
        n_rows,
        n_cols,
        first,
        o.ignore_index,
        *_numbers(o),
        PADDED=pads,
        ENTROPY=o.entropy,
        SUM_P2=o.sum_p2,
        HAS_SOFTCAP=o.softcap is not None,
        HAS_TEMPERATURE=temperature is not None,
        BLOCK=config.block,
        STAGES=config.stages,
        num_warps=config.warps,
    )
