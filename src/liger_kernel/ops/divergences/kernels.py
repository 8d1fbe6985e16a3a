"""The one kernel of KL divergence, JSD and total variation distance: it reads both distributions once and writes the
gradient once. With reduction "none" a backward of its own reads them again, and what arrives."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from liger_kernel._core.contract import Grads, Needs, Saved
from liger_kernel._core.rows import gradient_scale
from liger_kernel._core.shapes import as_rows, cdiv, next_power_of_2
from liger_kernel.backends.kernels import launch, log2
from liger_kernel.ops.divergences.contract import DivergenceOptions
from liger_kernel.ops.scale_gradients import scale_gradients

_LOG2_E = tl.constexpr(math.log2(math.e))
_LN_2 = tl.constexpr(math.log(2))
_LOG2_LN_2 = tl.constexpr(math.log2(math.log(2)))


@dataclass(frozen=True)
class Config:
    """A program owns `blocks` tiles of (rows, block) elements side by side.

    Nothing here is measured yet. Tiles are small and programs many, as in `relu_squared`: a row is spread over many
    processors, so that a few long rows fill all of them, and programs that wait for memory leave room for others.
    """

    rows: int
    block: int
    blocks: int
    warps: int

    @staticmethod
    @functools.cache
    def of(n_cols: int) -> Config:
        block = min(next_power_of_2(n_cols), 4096)
        return Config(max(1, 4096 // block), block, blocks=1, warps=8)

    def programs(self, n_rows: int, n_cols: int) -> int:
        return cdiv(n_rows, self.rows) * cdiv(n_cols, self.block * self.blocks)


@triton.jit
def _log2(x, EXACT: tl.constexpr):
    if EXACT:
        found = tl.log2(x)
    else:
        found = log2(x)
    return found


@triton.jit
def term(x, y, number, rest, FORM: tl.constexpr, EXACT: tl.constexpr):
    """The term of each class in fp32, its derivative in x, and q. A class of probability 0 adds 0, whatever the other
    distribution has there.

    FORM      x      y      term
    tvd       q      p      |q - p| / 2
    kl        log q  p      p (log max(p, number) - log q)
    kl_log    log q  log p  p (log p - log q)
    kl_back   log q  log p  q (log q - log p)
    jsd       log q  log p  b p (log p - log m) + (1 - b) q (log q - log m),  m = b p + (1 - b) q,  b = number

    `rest` is 1 - number, which fp32 would leave with half of its digits. Powers and logarithms are of base 2: 2
    instructions instead of 5, and 1 instead of 25, unless it has to be EXACT, as the logarithm of a probability always
    has: log q, from which it is taken, may be close.
    """
    q = x if FORM == "tvd" else tl.exp2(x * _LOG2_E)
    if FORM == "tvd":
        d = x - y
        term = 0.5 * tl.abs(d)
        slope = tl.where(d > 0.0, 0.5, tl.where(d < 0.0, -0.5, d))
    elif FORM == "kl":
        log_p = _log2(tl.maximum(y, number), True) * _LN_2
        term = tl.where(y == 0.0, 0.0, y * (log_p - x))
        slope = -y
    elif FORM == "kl_log":
        p = tl.exp2(y * _LOG2_E)
        term = tl.where(p == 0.0, 0.0, p * (y - x))
        slope = -p
    elif FORM == "kl_back":
        term = tl.where(q == 0.0, 0.0, q * (x - y))
        slope = term + q
    else:
        # With `high` the larger of p and q, t the other divided by it, and l = log(m / high), the logarithms of the
        # formula are -l and -(|log p - log q| + l). So nothing overflows, and near p = q nothing is rounded away.
        d = y - x
        up = d > 0.0
        size = tl.abs(d) * _LOG2_E
        # where that is infinite, or NaN since both are 0, t is 0, and so is `far`
        size = tl.where(size < 200.0, size, 200.0)
        t = tl.exp2(-size)
        largest = tl.maximum(x, y, propagate_nan=tl.PropagateNan.ALL)
        high = tl.exp2(largest * _LOG2_E + _LOG2_LN_2)  # times ln 2: those logarithms are of base 2
        of_high = tl.where(up, number, rest)
        of_low = tl.where(up, rest, number)
        share = of_high + of_low * t
        log_share = _log2(share, EXACT)
        far = t * size
        term = -high * (share * log_share + of_low * far)
        slope = -rest * high * tl.where(up, t * log_share + far, log_share)
        q = high * tl.where(up, t * _LOG2_E, _LOG2_E)
    return term, slope, q


@triton.jit
def _divergence(
    x_ptr,
    y_ptr,
    target_ptr,
    count_ptr,
    scale_ptr,
    upstream_ptr,
    loss_ptr,
    grad_ptr,
    x_stride,
    y_stride,
    upstream_stride,
    n_rows,
    n_cols,
    ignore_index,
    divisor,
    number,
    rest,
    FORM: tl.constexpr,
    REDUCED: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """Terms, and their gradient, of ROWS rows and BLOCKS times BLOCK columns, which this program owns.

    What is not wanted, or not there, is None. The loss is written term by term, or REDUCED to the sum of each program
    over divisor and count; the gradient is that of the loss times scale and upstream. Ignored rows are not read.
    """
    EXACT: tl.constexpr = (
        x_ptr.dtype.element_ty == tl.float32 or y_ptr.dtype.element_ty == tl.float32
    )
    n_parts = tl.cdiv(n_cols, BLOCK * BLOCKS)
    program = tl.program_id(0)
    rows = (program // n_parts).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    first = (program % n_parts) * (BLOCK * BLOCKS)
    there = rows < n_rows
    counted = there
    if target_ptr is not None:
        label = tl.load(target_ptr + rows, mask=there, other=0)
        counted = there & (label != ignore_index)
    factor = 1.0 / divisor
    if count_ptr is not None:
        factor /= tl.maximum(tl.load(count_ptr).to(tl.float32), 1.0)
    grad_factor = factor
    if scale_ptr is not None:
        grad_factor *= tl.load(scale_ptr).to(tl.float32)

    # of a class that is not there: probability 0
    nothing: tl.constexpr = 0.0 if FORM == "tvd" or FORM == "kl" else float("-inf")
    total = tl.zeros((ROWS, BLOCK), tl.float32)
    for i in range(BLOCKS):
        cols = first + i * BLOCK + tl.arange(0, BLOCK)
        inside = there[:, None] & (cols < n_cols)[None, :]
        mask = counted[:, None] & (cols < n_cols)[None, :]
        x_at = x_ptr + rows[:, None] * x_stride + cols[None, :]
        y_at = y_ptr + rows[:, None] * y_stride + cols[None, :]
        x = tl.load(x_at, mask=mask, other=nothing, eviction_policy="evict_first").to(tl.float32)
        y = tl.load(y_at, mask=mask, other=nothing, eviction_policy="evict_first").to(tl.float32)
        found, slope, _ = term(x, y, number, rest, FORM, EXACT)
        at = rows[:, None] * n_cols + cols[None, :]
        if REDUCED:
            total += found
        elif loss_ptr is not None:
            tl.store(loss_ptr + at, found, mask=inside)
        if grad_ptr is not None:
            if upstream_ptr is not None:
                up_at = upstream_ptr + rows[:, None] * upstream_stride + cols[None, :]
                slope *= tl.load(up_at, mask=mask, other=0.0).to(tl.float32)
            slope = (slope * grad_factor).to(grad_ptr.dtype.element_ty)
            tl.store(grad_ptr + at, slope, mask=inside, eviction_policy="evict_first")
    if REDUCED:
        tl.store(loss_ptr + program, tl.sum(tl.sum(total, 1), 0) * factor)


def _run(
    x: Tensor,
    y: Tensor,
    target: Tensor | None,
    options: DivergenceOptions,
    *,
    divisor: float = 1.0,
    count: Tensor | None = None,
    loss: Tensor | None = None,
    grad: Tensor | None = None,
    scale: Tensor | None = None,
    upstream: Tensor | None = None,
) -> None:
    (n_rows, n_cols), (form, number) = x.shape, options.form
    config = Config.of(n_cols)
    if not x.numel():
        return
    launch(
        _divergence,
        (config.programs(n_rows, n_cols),),
        *(x, y, target, count, scale, upstream, loss, grad),
        *(x.stride(0), y.stride(0), 0 if upstream is None else upstream.stride(0)),
        *(n_rows, n_cols, options.ignore_index, float(divisor), float(number), 1.0 - number),
        FORM=form,
        REDUCED=options.reduction != "none",
        ROWS=config.rows,
        BLOCK=config.block,
        BLOCKS=config.blocks,
        num_warps=config.warps,
    )


def forward(
    x: Tensor,
    y: Tensor,
    target: Tensor | None,
    count: Tensor | None,
    *,
    options: DivergenceOptions,
    needs: Needs,
) -> tuple[Tensor, Saved]:
    x, y = as_rows(x), as_rows(y)
    target = None if target is None else target.contiguous()
    n_rows, n_cols = x.shape
    if options.reduction == "none":
        loss = torch.empty(x.shape, dtype=torch.float32, device=x.device)
        _run(x, y, target, options, loss=loss)
        return loss, (x, y, target)
    divisor = n_cols if options.reduction == "mean" else 1
    if options.reduction == "sum":
        count = None
    elif count is None:
        divisor *= n_rows
    grad = scale = None
    if needs[0]:
        grad = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        if x.dtype == torch.float16:
            rows = torch.ones((), device=x.device) if count is None else count
            scale = gradient_scale(x.dtype, rows * divisor, x.device)
    programs = Config.of(n_cols).programs(n_rows, n_cols)
    loss = torch.empty(programs, dtype=torch.float32, device=x.device)
    _run(x, y, target, options, divisor=divisor, count=count, loss=loss, grad=grad, scale=scale)
    return loss.sum(), (grad, scale)


def backward(grads: Grads, saved: Saved, *, options: DivergenceOptions, needs: Needs) -> Grads:
    upstream = grads[0]
    if options.reduction != "none":
        grad, scale = saved
        scale_gradients([grad], upstream if scale is None else upstream / scale)
        return grad, None, None, None
    x, y, target = saved
    assert x is not None
    assert y is not None
    grad = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    _run(x, y, target, options, grad=grad, upstream=as_rows(upstream))
    return grad, None, None, None
