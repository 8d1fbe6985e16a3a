"""Cross entropy kernels. Loss and gradient read the logits twice and write the gradient once; the second read of a row
of 128k bf16 logits (256 KB) is served by the L2 cache."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from liger_kernel._core.shapes import next_power_of_2
from liger_kernel.backends import facts_of
from liger_kernel.backends.kernels import launch
from liger_kernel.backends.records import DeviceFacts
from liger_kernel.ops.cross_entropy.contract import CrossEntropyOptions, CrossEntropyRows, Totals

#: as in the reference: a row whose largest logit is further from 0 is shifted
_FAR = tl.constexpr(2.0**16)
# what Triton must know a length to be divisible by, to load whole vectors and ahead
_VECTOR = tl.constexpr(16)


@dataclass(frozen=True)
class Config:
    """One program loops over the blocks of a row, `stages` of them in flight.

    Measured on an H100 over 60 settings, in place: rows of 128k fit the L2 only if each processor has one of them under
    way, so a block takes all of its shared memory (2048x128256 0.511 -> 0.468 ms, 2048x256000 1.051 -> 1.006). Shorter
    rows leave room for more (4096x32000 0.233 -> 0.212). With a soft cap, small blocks on many programs hide the tanh.
    Rows that are no whole vectors are not loaded ahead: 8192x50257 takes 2.03 ms so, and 1.14 in smaller blocks.
    Elsewhere nothing is loaded ahead.
    """

    block: int
    warps: int
    stages: int

    @staticmethod
    @functools.cache
    def of(n_cols: int, itemsize: int, capped: bool, vectors: bool, facts: DeviceFacts) -> Config:
        if not vectors and not capped and n_cols > 8192:
            return Config(8192, facts.most_warps, stages=1)
        longest = 4096 if capped else 16384 if n_cols <= 65536 else 32768
        block = min(next_power_of_2(n_cols), longest)
        stages = 1
        if facts.architecture == "hopper" and n_cols > block:
            stages = facts.stages(2 if capped else 3, block * itemsize)
        if stages == 1:
            block = min(next_power_of_2(n_cols), 16384)
            return Config(block, warps=min(facts.most_warps, max(4, block // 512)), stages=1)
        return Config(
            block, warps=min(16, block // 512 if capped else block // 1024), stages=stages
        )


@triton.jit
def _tanh(z, EXACT: tl.constexpr):
    """1 - 2 / (exp(2 |z|) + 1), absolute error 1e-7: enough for logits that were rounded to 16 bits.

    With EXACT, up to 1, where that cancels: Lambert's continued fraction (relative error 6e-8), written as z minus a
    correction, so that its rounding counts for a quarter at most.
    """
    size = tl.abs(z)
    far = 1.0 - 2.0 / (tl.exp(2.0 * size) + 1.0)
    far = tl.where(z < 0.0, -far, far)
    if EXACT:
        s = z * z
        near = z - z * (s * (315.0 + 14.0 * s) / (945.0 + s * (420.0 + 15.0 * s)))
        far = tl.where(size < 1.0, near, far)
    return far


@triton.jit
def _no_gradient(grad_row, n_cols, BLOCK: tl.constexpr):
    zeros = tl.zeros((BLOCK,), tl.float32).to(grad_row.dtype.element_ty)
    cols = tl.arange(0, BLOCK)
    for start in range(0, n_cols, BLOCK):
        tl.store(grad_row + start + cols, zeros, mask=start + cols < n_cols)


@triton.jit
def _statistics(
    x_row,
    weight_ptr,
    n_cols,
    n_read,
    softcap,
    PADDED: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HAS_SMOOTHING: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    WANTS_BEST: tl.constexpr,
    EXACT: tl.constexpr,
    BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Of a row: its largest logit, the sum of exp(x - that), the sum of w x, and the first column of the largest."""
    cols = tl.arange(0, BLOCK)
    top = float("-inf")  # the largest logit so far
    total = 0.0  # sum of exp(x - top)
    smooth = 0.0  # sum of w x
    best = 0  # the first column that holds `top`
    for start in tl.range(0, n_read, BLOCK, num_stages=STAGES):
        inside = start + cols < n_read
        x = tl.load(x_row + start + cols, mask=inside, other=0.0, eviction_policy="evict_last").to(
            tl.float32
        )
        mask = start + cols < n_cols if PADDED else inside
        if HAS_SOFTCAP:
            x = softcap * _tanh(x / softcap, EXACT)
        if HAS_SMOOTHING:
            if HAS_WEIGHT:
                w = tl.load(weight_ptr + start + cols, mask=mask, other=0.0).to(tl.float32)
                smooth += tl.sum(tl.where(mask, w * x, 0.0), 0)
            else:
                smooth += tl.sum(tl.where(mask, x, 0.0), 0)
        x = tl.where(mask, x, float("-inf"))
        block_top = tl.max(x, 0)
        if WANTS_BEST:
            first = tl.min(tl.where(x == block_top, start + cols, n_cols), 0)
            best = tl.where(block_top > top, first, best)
        new_top = tl.maximum(top, block_top)
        # as long as every logit is -inf (classes that are masked out), exp(x - top) would be NaN
        anchor = tl.where(new_top == float("-inf"), 0.0, new_top)
        total = total * tl.exp(top - anchor) + tl.sum(tl.exp(x - anchor), 0)
        top = new_top
    return top, total, smooth, best


@triton.jit
def _gradient(
    x_row,
    grad_row,
    weight_ptr,
    label,
    is_here,
    x_y,
    top,
    slope,
    hit,
    share,
    n_cols,
    n_read,
    softcap,
    PADDED: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HAS_SMOOTHING: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    EXACT: tl.constexpr,
    BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
):
    """slope exp(x - top) - share w - hit [v = label], times the slope of the soft-cap; `is_here`: None, or a mask."""
    cols = tl.arange(0, BLOCK)
    n_blocks = tl.cdiv(n_read, BLOCK)
    for i in tl.range(0, n_blocks, num_stages=STAGES):
        # last block first: it is the one most likely still in the cache
        start = (n_blocks - 1 - i) * BLOCK
        inside = start + cols < n_read
        x = tl.load(x_row + start + cols, mask=inside, other=0.0, eviction_policy="evict_first").to(
            tl.float32
        )
        cap_slope = 1.0
        if HAS_SOFTCAP:
            t = _tanh(x / softcap, EXACT)
            x = softcap * t
            cap_slope = 1.0 - t * t
        g = slope * tl.exp(x - top)
        if HAS_SMOOTHING:
            if HAS_WEIGHT:
                mask = start + cols < n_cols
                w = tl.load(weight_ptr + start + cols, mask=mask, other=0.0).to(tl.float32)
                g -= share * w
            else:
                g -= share
        g = (g * cap_slope).to(grad_row.dtype.element_ty)
        # written rows and rows read twice make room in the L2 for those that are still to be read again: 3 %
        tl.store(grad_row + start + cols, g, mask=inside, eviction_policy="evict_first")
    # the label's class again, with what only it has; a select for each class of the row would cost more
    g = slope * tl.exp(x_y - top) - hit
    if HAS_SMOOTHING:
        if HAS_WEIGHT:
            g -= share * tl.load(weight_ptr + label).to(tl.float32)
        else:
            g -= share
    if HAS_SOFTCAP:
        g *= 1.0 - (x_y / softcap) * (x_y / softcap)
    tl.debug_barrier()
    tl.store(grad_row + label, g.to(grad_row.dtype.element_ty), mask=is_here)
    if PADDED:
        beyond = n_cols + tl.arange(0, _VECTOR)
        none = tl.zeros((_VECTOR,), tl.float32).to(grad_row.dtype.element_ty)
        tl.store(grad_row + beyond, none, mask=beyond < n_read)


@triton.jit
def _cross_entropy(
    x_ptr,
    grad_ptr,
    target_ptr,
    weight_ptr,
    loss_ptr,
    z_loss_ptr,
    accuracy_ptr,
    predicted_ptr,
    count_ptr,
    weight_total_ptr,
    weight_all_ptr,
    row_scale_ptr,
    x_stride,
    grad_stride,
    n_cols,
    ignore_index,
    lse_square_scale,
    label_smoothing,
    softcap,
    PADDED: tl.constexpr,
    MEAN: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HAS_SMOOTHING: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_ROW_SCALE: tl.constexpr,
    TOKEN_SCALING: tl.constexpr,
    WRITE_GRAD: tl.constexpr,
    WRITE_Z_LOSS: tl.constexpr,
    WRITE_ACCURACY: tl.constexpr,
    WRITE_PREDICTED: tl.constexpr,
    BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Loss terms and gradient of one row (formulas: `contract.py`); grad_ptr may be x_ptr. One program owns one row.

    Where rows are PADDED to a multiple of _VECTOR, an odd number of classes is read in vectors, too; the padding
    counts for nothing, and its gradient is zero.
    """
    EXACT: tl.constexpr = x_ptr.dtype.element_ty == tl.float32
    row = tl.program_id(0).to(tl.int64)
    y = tl.load(target_ptr + row)
    x_row = x_ptr + row * x_stride
    n_read = tl.cdiv(n_cols, _VECTOR) * _VECTOR if PADDED else n_cols
    grad_row = grad_ptr
    if WRITE_GRAD:
        grad_row = grad_ptr + row * grad_stride

    if y == ignore_index:
        tl.store(loss_ptr + row, 0.0)
        if WRITE_Z_LOSS:
            tl.store(z_loss_ptr + row, 0.0)
        if WRITE_ACCURACY:
            tl.store(accuracy_ptr + row, 0.0)
        if WRITE_PREDICTED:
            tl.store(predicted_ptr + row, -1)
        if WRITE_GRAD:
            _no_gradient(grad_row, n_cols, BLOCK)
        return

    # A label out of range reads class 0 and makes loss and gradient NaN.
    in_range = (y >= 0) & (y < n_cols)
    label = tl.where(in_range, y, 0)
    x_y = tl.load(x_row + label).to(tl.float32)
    if HAS_SOFTCAP:
        x_y = softcap * _tanh(x_y / softcap, EXACT)
    x_y = tl.where(in_range, x_y, float("nan"))

    top, total, smooth, best = _statistics(
        x_row,
        weight_ptr,
        n_cols,
        n_read,
        softcap,
        PADDED,
        HAS_WEIGHT,
        HAS_SMOOTHING,
        HAS_SOFTCAP,
        WRITE_ACCURACY or WRITE_PREDICTED,
        EXACT,
        BLOCK,
        STAGES,
    )
    lse = top + tl.log(total)

    hit = 1.0 - label_smoothing
    if HAS_WEIGHT:
        hit *= tl.load(weight_ptr + label).to(tl.float32)
    slope = hit
    # beside a top as far from 0 as that of classes that are all masked, lse would lose the logarithm of the sum
    nll = tl.where(tl.abs(top) < _FAR, lse - x_y, tl.log(total) - (x_y - top))
    loss = hit * nll
    share = 0.0
    if HAS_SMOOTHING:
        share = label_smoothing / n_cols
        weight_all = n_cols * 1.0
        if HAS_WEIGHT:
            weight_all = tl.load(weight_all_ptr).to(tl.float32)
        loss += share * (weight_all * lse - smooth)
        slope += share * weight_all
    z = lse_square_scale * lse * lse
    z_slope = 2.0 * lse_square_scale * lse
    if MEAN:
        count = tl.load(count_ptr).to(tl.float32)
        divisor = count
        if HAS_WEIGHT:
            divisor = tl.load(weight_total_ptr).to(tl.float32)
        loss /= divisor
        slope /= divisor
        hit /= divisor
        share /= divisor
        z /= count
        z_slope /= count
    loss += z
    slope += z_slope
    if TOKEN_SCALING:
        probability = tl.exp(x_y - top) / total
        loss *= probability
        z *= probability
        slope *= probability
        hit *= probability
        share *= probability

    tl.store(loss_ptr + row, loss.to(loss_ptr.dtype.element_ty))
    if WRITE_Z_LOSS:
        tl.store(z_loss_ptr + row, z.to(z_loss_ptr.dtype.element_ty))
    if WRITE_ACCURACY:
        tl.store(accuracy_ptr + row, tl.where(best == y, 1.0, 0.0))
    if WRITE_PREDICTED:
        tl.store(predicted_ptr + row, best.to(tl.int64))

    if WRITE_GRAD:
        if HAS_ROW_SCALE:
            row_scale = tl.load(row_scale_ptr + row).to(tl.float32)
            slope *= row_scale
            hit *= row_scale
            share *= row_scale
        # exp(x - top) / total keeps digits that exp(x - lse) loses where lse is large
        slope = tl.where(in_range, slope / total, float("nan"))
        _gradient(
            x_row,
            grad_row,
            weight_ptr,
            label,
            None,
            x_y,
            top,
            slope,
            hit,
            share,
            n_cols,
            n_read,
            softcap,
            PADDED,
            HAS_WEIGHT,
            HAS_SMOOTHING,
            HAS_SOFTCAP,
            EXACT,
            BLOCK,
            STAGES,
        )


@triton.jit
def _shard_statistics(
    x_ptr,
    target_ptr,
    out_ptr,
    x_stride,
    n_rows,
    n_cols,
    first,
    ignore_index,
    softcap,
    PADDED: tl.constexpr,
    HAS_SMOOTHING: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    WANTS_BEST: tl.constexpr,
    BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
):
    """A row of some classes, from `first` on: see `contract.Kernels.statistics`. One program owns one row."""
    EXACT: tl.constexpr = x_ptr.dtype.element_ty == tl.float32
    row = tl.program_id(0).to(tl.int64)
    y = tl.load(target_ptr + row)
    if y == ignore_index:
        return
    x_row = x_ptr + row * x_stride
    n_read = tl.cdiv(n_cols, _VECTOR) * _VECTOR if PADDED else n_cols
    label = y - first
    x_y = tl.load(x_row + label, mask=(label >= 0) & (label < n_cols), other=0.0).to(tl.float32)
    if HAS_SOFTCAP:
        x_y = softcap * _tanh(x_y / softcap, EXACT)
    top, total, smooth, best = _statistics(
        x_row,
        x_ptr,
        n_cols,
        n_read,
        softcap,
        PADDED,
        False,
        HAS_SMOOTHING,
        HAS_SOFTCAP,
        WANTS_BEST,
        EXACT,
        BLOCK,
        STAGES,
    )
    out = out_ptr + row
    step = tl.cast(n_rows, tl.int64)
    tl.store(out, top)
    tl.store(out + step, total)
    tl.store(out + 2 * step, x_y)
    tl.store(out + 3 * step, smooth)
    tl.store(out + 4 * step, (best + first).to(tl.float32))


@triton.jit
def _shard_gradient(
    x_ptr,
    grad_ptr,
    target_ptr,
    factors_ptr,
    x_stride,
    grad_stride,
    n_rows,
    n_cols,
    first,
    ignore_index,
    softcap,
    PADDED: tl.constexpr,
    HAS_SMOOTHING: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
):
    """The gradient of a row of some classes: see `contract.Kernels.gradient`. One program owns one row."""
    EXACT: tl.constexpr = x_ptr.dtype.element_ty == tl.float32
    row = tl.program_id(0).to(tl.int64)
    y = tl.load(target_ptr + row)
    x_row = x_ptr + row * x_stride
    grad_row = grad_ptr + row * grad_stride
    if y == ignore_index:
        _no_gradient(grad_row, n_cols, BLOCK)
        return
    n_read = tl.cdiv(n_cols, _VECTOR) * _VECTOR if PADDED else n_cols
    label = y - first
    is_here = (label >= 0) & (label < n_cols)
    label = tl.where(is_here, label, 0)
    x_y = tl.load(x_row + label).to(tl.float32)
    if HAS_SOFTCAP:
        x_y = softcap * _tanh(x_y / softcap, EXACT)
    factors = factors_ptr + row
    step = tl.cast(n_rows, tl.int64)
    _gradient(
        x_row,
        grad_row,
        x_ptr,
        label,
        is_here,
        x_y,
        tl.load(factors),
        tl.load(factors + step),
        tl.load(factors + 2 * step),
        tl.load(factors + 3 * step),
        n_cols,
        n_read,
        softcap,
        PADDED,
        False,
        HAS_SMOOTHING,
        HAS_SOFTCAP,
        EXACT,
        BLOCK,
        STAGES,
    )


def step(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    *,
    totals: Totals,
    options: CrossEntropyOptions,
    out: CrossEntropyRows,
    grad: Tensor | None,
    row_scale: Tensor | None,
    padded: bool,
) -> None:
    _, z_loss, accuracy, predicted = out.columns
    n_rows, n_cols = logits.shape
    if not n_rows:
        return
    config, pads = tile(logits, options.softcap, padded)
    launch(
        _cross_entropy,
        (n_rows,),
        logits,
        grad,
        target,
        weight,
        out.loss,
        z_loss,
        accuracy,
        predicted,
        totals.count,
        totals.weight,
        totals.weight_all,
        row_scale,
        logits.stride(0),
        0 if grad is None else grad.stride(0),
        n_cols,
        options.ignore_index,
        options.lse_square_scale,
        options.label_smoothing,
        options.softcap or 0.0,
        PADDED=pads,
        MEAN=options.reduction == "mean",
        HAS_WEIGHT=weight is not None,
        HAS_SMOOTHING=options.label_smoothing != 0,
        HAS_SOFTCAP=options.softcap is not None,
        HAS_ROW_SCALE=row_scale is not None,
        TOKEN_SCALING=options.token_scaling,
        WRITE_GRAD=grad is not None,
        WRITE_Z_LOSS=z_loss is not None,
        WRITE_ACCURACY=accuracy is not None,
        WRITE_PREDICTED=predicted is not None,
        BLOCK=config.block,
        STAGES=config.stages,
        num_warps=config.warps,
    )


def statistics(
    logits: Tensor,
    target: Tensor,
    *,
    first: int,
    options: CrossEntropyOptions,
    out: Tensor,
    padded: bool,
) -> None:
    smooths = options.label_smoothing != 0
    best = options.return_token_accuracy or options.return_predicted_tokens
    more = {"HAS_SMOOTHING": smooths, "WANTS_BEST": best}
    _on_shard(_shard_statistics, logits, (target, out), (), first, options, padded, more)


def gradient(
    logits: Tensor,
    target: Tensor,
    factors: Tensor,
    *,
    first: int,
    options: CrossEntropyOptions,
    grad: Tensor,
    padded: bool,
) -> None:
    more = {"HAS_SMOOTHING": options.label_smoothing != 0}
    tensors, strides = (grad, target, factors), (grad.stride(0),)
    _on_shard(_shard_gradient, logits, tensors, strides, first, options, padded, more)


def _on_shard(
    kernel: Any,
    logits: Tensor,
    tensors: tuple[Tensor, ...],
    strides: tuple[int, ...],
    first: int,
    options: CrossEntropyOptions,
    padded: bool,
    constants: dict[str, bool],
) -> None:
    n_rows, n_cols = logits.shape
    if not n_rows:
        return
    config, pads = tile(logits, options.softcap, padded)
    launch(
        kernel,
        (n_rows,),
        logits,
        *tensors,
        logits.stride(0),
        *strides,
        n_rows,
        n_cols,
        first,
        options.ignore_index,
        options.softcap or 0.0,
        PADDED=pads,
        HAS_SOFTCAP=options.softcap is not None,
        **constants,
        BLOCK=config.block,
        STAGES=config.stages,
        num_warps=config.warps,
    )


def tile(logits: Tensor, softcap: float | None, padded: bool) -> tuple[Config, bool]:
    """The configuration, and whether rows are read beyond their end."""
    n_cols = logits.shape[1]
    whole = n_cols % _VECTOR.value == 0
    config = Config.of(
        n_cols,
        logits.element_size(),
        softcap is not None,
        padded or (whole and logits.stride(0) % _VECTOR.value == 0),
        facts_of(logits.device),
    )
    return config, padded and not whole
