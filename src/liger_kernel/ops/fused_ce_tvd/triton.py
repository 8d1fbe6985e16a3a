"""Distances between two rows of logits. They are read once for what makes them probabilities, once more for the
distance, unless its gradient can be written without it, and once for the gradient, which may replace the student's.

Each walk goes the other way than the one before, so that it starts with what the cache still has: two rows of 128k
bf16 logits are 0.5 MB, too much for all processors at once.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from liger_kernel._core.contract import Grads, Needs, Saved
from liger_kernel._core.rows import RowOutputs
from liger_kernel._core.shapes import as_rows, next_power_of_2
from liger_kernel.backends import facts_of
from liger_kernel.backends.kernels import launch
from liger_kernel.backends.records import DeviceFacts
from liger_kernel.ops.divergences.kernels import term
from liger_kernel.ops.fused_ce_tvd.contract import CETVDOptions, Distance

_LOG2_E = tl.constexpr(math.log2(math.e))


@dataclass(frozen=True)
class Config:
    """One program owns a row and walks over its blocks, `stages` of them in flight, 16 elements of each in a thread.

    Nothing here is measured yet.
    """

    block: int
    warps: int
    stages: int

    @staticmethod
    @functools.cache
    def of(width: int, itemsize: int, facts: DeviceFacts) -> Config:
        block = min(next_power_of_2(width), 8192)
        stages = 1
        if facts.architecture == "hopper" and width > block:
            stages = facts.stages(3, 2 * block * itemsize)
        return Config(block, min(facts.most_warps, max(4, block // 512)), stages)


@triton.jit
def _with_zeros(top, total, cool, n_more):
    """(top, sum exp((z - top) cool)) of logits z to which n_more are added that are 0."""
    high = tl.where(n_more > 0, tl.maximum(top, 0.0), top)
    return high, total * tl.exp((top - high) * cool) + n_more * tl.exp(-high * cool)


@triton.jit
def _log_probabilities(
    at, cols, n_cols, width, top, cool, log_total, SAME: tl.constexpr, EVICT: tl.constexpr
):
    """The logits, 0 where this model does not know the class, and the logarithms of their probabilities."""
    absent: tl.constexpr = float("-inf") if SAME else 0.0
    z = tl.load(at, mask=cols < n_cols, other=absent, eviction_policy=EVICT).to(tl.float32)
    x = (z - top) * cool - log_total
    if not SAME:
        x = tl.where(cols < width, x, float("-inf"))
    return z, x


@triton.jit
def _slopes(x, y, number, rest, FORM: tl.constexpr, EXACT: tl.constexpr):
    """q, the term of each class, and its derivative in log q, from log q and log p, or for "kl" p itself."""
    if FORM == "tvd":
        q = tl.exp2(x * _LOG2_E)
        found, slope, _ = term(q, tl.exp2(y * _LOG2_E), number, rest, FORM, EXACT)
        slope *= q
    else:
        found, slope, q = term(x, y, number, rest, FORM, EXACT)
    return q, found, slope


@triton.jit
def _distance(
    s_ptr,
    t_ptr,
    grad_ptr,
    target_ptr,
    loss_ptr,
    soft_ptr,
    hard_ptr,
    count_ptr,
    hard_scale_ptr,
    soft_scale_ptr,
    lse_ptr,
    t_lse_ptr,
    slopes_ptr,
    s_stride,
    t_stride,
    grad_stride,
    n_cols,
    t_cols,
    ignore_index,
    cool,
    hard_weight,
    soft_weight,
    number,
    rest,
    FORM: tl.constexpr,
    HARD: tl.constexpr,
    OWN: tl.constexpr,
    SAME: tl.constexpr,
    WRITE_LOSS: tl.constexpr,
    WRITE_GRAD: tl.constexpr,
    SAVED: tl.constexpr,
    BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Cross entropy and distance of one row, which this program owns, and their gradient; grad_ptr may be s_ptr.

    With q the softmax of the student's logits z divided by the temperature, s_v the derivative of term v in log q_v:
    d distance / d z_v = (s_v - q_v sum(s)) / temperature. What is not there, or not wanted, is None.

    SAVED: both logsumexps and sum(s), which another launch wrote, are read. SAME: both models have the same number of
    classes. OWN: there is a cross entropy, and its softmax is another one than that of the distance, since the
    temperature is not 1, or the teacher knows more classes.
    """
    EXACT: tl.constexpr = (
        s_ptr.dtype.element_ty == tl.float32 or t_ptr.dtype.element_ty == tl.float32
    )
    KNOWN: tl.constexpr = FORM == "kl" or FORM == "kl_log"  # sum(s) = -sum(p)
    COSINE: tl.constexpr = FORM == "cosine"
    absent: tl.constexpr = float("-inf") if SAME else 0.0
    row = tl.program_id(0).to(tl.int64)
    label = tl.load(target_ptr + row)
    s_row = s_ptr + row * s_stride
    t_row = t_ptr + row * t_stride
    grad_row = grad_ptr
    if WRITE_GRAD:
        grad_row = grad_ptr + row * grad_stride
    lanes = tl.arange(0, BLOCK)
    width = n_cols if SAME else tl.maximum(n_cols, t_cols)
    n_blocks = tl.cdiv(width, BLOCK)

    if label == ignore_index:
        if loss_ptr is not None:
            tl.store(loss_ptr + row, 0.0)
        if soft_ptr is not None:
            tl.store(soft_ptr + row, 0.0)
        if hard_ptr is not None:
            tl.store(hard_ptr + row, 0.0)
        if WRITE_GRAD:
            zeros = tl.zeros((BLOCK,), tl.float32).to(grad_ptr.dtype.element_ty)
            for start in range(0, n_cols, BLOCK):
                tl.store(grad_row + start + lanes, zeros, mask=start + lanes < n_cols)
        return

    in_range = (label >= 0) & (label < n_cols)
    x_y = 0.0
    if HARD and not SAVED:
        x_y = tl.load(s_row + tl.where(in_range, label, 0)).to(tl.float32)
        x_y = tl.where(in_range, x_y, float("nan"))

    top = 0.0  # the largest logit
    t_top = 0.0
    own_top = 0.0  # that of the cross entropy, which knows the student's classes alone
    log_total = 0.0  # log sum exp((z - top) / temperature)
    t_log_total = 0.0
    hard_total = 1.0  # sum exp(z - top)
    slopes = 0.0
    per_s = 0.0  # of the cosine: 1 / |z|
    per_t = 0.0
    soft = 0.0
    hard = 0.0
    if SAVED:
        log_total = tl.load(lse_ptr + row)
        t_log_total = tl.load(t_lse_ptr + row)
        slopes = tl.load(slopes_ptr + row)
    else:
        top = float("-inf")
        t_top = float("-inf")
        total = tl.zeros((BLOCK,), tl.float32)
        t_total = tl.zeros((BLOCK,), tl.float32)
        of_own = tl.zeros((BLOCK,), tl.float32)
        s_s = tl.zeros((BLOCK,), tl.float32)
        t_t = tl.zeros((BLOCK,), tl.float32)
        s_t = tl.zeros((BLOCK,), tl.float32)
        for i in tl.range(0, n_blocks, num_stages=STAGES):
            cols = i * BLOCK + lanes
            s_at, t_at = s_row + cols, t_row + cols
            s = tl.load(
                s_at, mask=cols < n_cols, other=float("-inf"), eviction_policy="evict_last"
            ).to(tl.float32)
            t_other: tl.constexpr = 0.0 if FORM == "kl" else float("-inf")
            t = tl.load(t_at, mask=cols < t_cols, other=t_other, eviction_policy="evict_last").to(
                tl.float32
            )
            if COSINE:
                known = tl.where(cols < n_cols, s, 0.0)
                t = tl.where(cols < t_cols, t, 0.0)
                s_s += known * known
                t_t += t * t
                s_t += known * t
            if HARD or not COSINE:
                new_top = tl.maximum(top, tl.max(s, 0))
                # as long as every logit is -inf (classes that are masked out), exp(z - top) would be NaN
                anchor = tl.where(new_top == float("-inf"), 0.0, new_top)
                total = total * tl.exp((top - anchor) * cool) + tl.exp((s - anchor) * cool)
                if OWN:
                    of_own = of_own * tl.exp(top - anchor) + tl.exp(s - anchor)
                top = new_top
            if FORM == "kl":
                t_total += t
            elif not COSINE:
                new_top = tl.maximum(t_top, tl.max(t, 0))
                anchor = tl.where(new_top == float("-inf"), 0.0, new_top)
                t_total = t_total * tl.exp((t_top - anchor) * cool) + tl.exp((t - anchor) * cool)
                t_top = new_top
        if HARD or not COSINE:
            sum_total = tl.sum(total, 0)
            hard_total = tl.sum(of_own, 0) if OWN else sum_total
            own_top = top
            if HARD:
                hard = tl.log(hard_total) - (x_y - own_top)
            if not SAME and not COSINE:
                top, sum_total = _with_zeros(top, sum_total, cool, width - n_cols)
            log_total = tl.log(sum_total)
        if COSINE:
            per_s = 1.0 / tl.maximum(tl.sqrt(tl.sum(s_s, 0)), 1e-8)
            per_t = 1.0 / tl.maximum(tl.sqrt(tl.sum(t_t, 0)), 1e-8)
            slopes = tl.sum(s_t, 0) * per_s * per_t  # the cosine
            soft = number * (1.0 - slopes)
        elif FORM == "kl":
            slopes = -tl.sum(t_total, 0)
        else:
            sum_total = tl.sum(t_total, 0)
            if not SAME:
                t_top, sum_total = _with_zeros(t_top, sum_total, cool, width - t_cols)
            t_log_total = tl.log(sum_total)
            if FORM == "kl_log":
                slopes = -1.0

        if not COSINE and not (KNOWN and WRITE_GRAD):
            terms = tl.zeros((BLOCK,), tl.float32)
            of_terms = tl.zeros((BLOCK,), tl.float32)
            for i in tl.range(0, n_blocks, num_stages=STAGES):
                cols = (n_blocks - 1 - i) * BLOCK + lanes
                _, x = _log_probabilities(
                    s_row + cols, cols, n_cols, width, top, cool, log_total, SAME, "evict_last"
                )
                if FORM == "kl":
                    y = tl.load(t_row + cols, mask=cols < t_cols, other=0.0).to(tl.float32)
                else:
                    _, y = _log_probabilities(
                        t_row + cols, cols, t_cols, width, t_top, cool, t_log_total, SAME, "evict_last"
                    )  # fmt: skip
                _, found, slope = _slopes(x, y, number, rest, FORM, EXACT)
                terms += found
                if not KNOWN:
                    of_terms += slope
            soft = tl.sum(terms, 0)
            if not KNOWN:
                slopes = tl.sum(of_terms, 0)

    factor = 1.0
    if count_ptr is not None:
        factor = 1.0 / tl.maximum(tl.load(count_ptr).to(tl.float32), 1.0)

    if WRITE_GRAD:
        to_hard = hard_weight * factor
        to_soft = soft_weight * factor
        if hard_scale_ptr is not None:
            to_hard *= tl.load(hard_scale_ptr + row).to(tl.float32)
        if soft_scale_ptr is not None:
            to_soft *= tl.load(soft_scale_ptr + row).to(tl.float32)
        if HARD:
            to_hard = tl.where(in_range, to_hard, float("nan"))
        to_slope = to_soft * cool
        to_q = -to_slope * slopes
        if HARD and not OWN:
            to_q += to_hard
        of_s = to_soft * number * slopes * per_s * per_s
        of_t = -to_soft * number * per_s * per_t
        terms = tl.zeros((BLOCK,), tl.float32)
        for i in tl.range(0, n_blocks, num_stages=STAGES):
            # backwards where the walk before was the first one
            start = (n_blocks - 1 - i) * BLOCK if KNOWN or COSINE else i * BLOCK
            cols = start + lanes
            if COSINE:
                s = tl.load(s_row + cols, mask=cols < n_cols, other=absent).to(tl.float32)
                t = tl.load(t_row + cols, mask=cols < t_cols, other=absent).to(tl.float32)
                g = of_s * s + of_t * t
                if HARD:
                    g += to_hard * (tl.exp(s - own_top) / hard_total)
            else:
                s, x = _log_probabilities(
                    s_row + cols, cols, n_cols, width, top, cool, log_total, SAME, "evict_first"
                )
                if FORM == "kl":
                    y = tl.load(t_row + cols, mask=cols < t_cols, other=0.0).to(tl.float32)
                else:
                    _, y = _log_probabilities(
                        t_row + cols, cols, t_cols, width, t_top, cool, t_log_total, SAME, "evict_first"
                    )  # fmt: skip
                q, found, slope = _slopes(x, y, number, rest, FORM, EXACT)
                if KNOWN:
                    terms += found
                g = to_slope * slope + to_q * q
                if OWN:
                    g += to_hard * (tl.exp(s - own_top) / hard_total)
            if HARD:
                g -= tl.where(cols == label, to_hard, 0.0)
            g = g.to(grad_ptr.dtype.element_ty)
            tl.store(grad_row + cols, g, mask=cols < n_cols, eviction_policy="evict_first")
        if KNOWN:
            soft = tl.sum(terms, 0)

    if WRITE_LOSS:
        if loss_ptr is not None:
            tl.store(loss_ptr + row, (hard_weight * hard + soft_weight * soft) * factor)
        tl.store(soft_ptr + row, soft * factor)
        tl.store(hard_ptr + row, hard * factor)
        if lse_ptr is not None:
            tl.store(lse_ptr + row, top * cool + log_total)
            tl.store(t_lse_ptr + row, t_top * cool + t_log_total)
            tl.store(slopes_ptr + row, slopes)


def _run(
    student: Tensor,
    teacher: Tensor,
    target: Tensor,
    form: tuple[str, float],
    *,
    ignore_index: int,
    columns: Sequence[Tensor | None] = (None, None, None),
    statistics: Sequence[Tensor | None] = (None, None, None),
    count: Tensor | None = None,
    grad: Tensor | None = None,
    scales: tuple[Tensor | None, Tensor | None] = (None, None),
    weights: tuple[float, float] = (1.0, 1.0),
    temperature: float = 1.0,
    hard: bool = True,
) -> None:
    """columns: loss, distance, cross entropy; None: the `statistics` (both logsumexps, sum(s)) are read.
    scales, weights: of cross entropy and distance."""
    (n_rows, n_cols), t_cols = student.shape, teacher.shape[1]
    if not n_rows:
        return
    width, itemsize = max(n_cols, t_cols), max(student.element_size(), teacher.element_size())
    config = Config.of(width, itemsize, facts_of(student.device))
    name, number = form
    launch(
        _distance,
        (n_rows,),
        *(student, teacher, grad, target, *columns, count, *scales, *statistics),
        *(student.stride(0), teacher.stride(0), 0 if grad is None else grad.stride(0)),
        *(n_cols, t_cols, ignore_index, 1.0 / temperature, *map(float, weights)),
        *(float(number), 1.0 - number),
        FORM=name,
        HARD=hard,
        OWN=hard and (temperature != 1.0 or n_cols < t_cols) and name != "cosine",
        SAME=n_cols == t_cols,
        WRITE_LOSS=columns[1] is not None,
        WRITE_GRAD=grad is not None,
        SAVED=columns[1] is None,
        BLOCK=config.block,
        STAGES=config.stages,
        num_warps=config.warps,
    )


def step(
    logits: Tensor,
    teacher: Tensor,
    target: Tensor,
    *,
    distance: Distance,
    count: Tensor | None,
    out: RowOutputs,
    grad: Tensor | None,
    row_scale: Tensor | None,
) -> None:
    assert distance.form is not None
    _run(
        logits,
        as_rows(teacher),
        target,
        distance.form,
        ignore_index=distance.ignore_index,
        columns=out.columns,
        count=count,
        grad=grad,
        scales=(row_scale, row_scale),
        weights=(distance.hard_weight, distance.soft_weight),
        temperature=1.0 if distance.form[0] == "cosine" else distance.temperature,
        hard=distance.hard,
    )


_TVD = ("tvd", 0.0)


def forward(
    student: Tensor, teacher: Tensor, target: Tensor, *, options: CETVDOptions, needs: Needs
) -> tuple[tuple[Tensor, Tensor], Saved]:
    student, teacher, target = as_rows(student), as_rows(teacher), target.contiguous()
    tvd, ce, *statistics = torch.empty(
        5, student.shape[0], dtype=torch.float32, device=student.device
    )
    how: Any = {"statistics": statistics} if needs[0] else {}
    index = options.ignore_index
    _run(student, teacher, target, _TVD, ignore_index=index, columns=(None, tvd, ce), **how)
    return (ce, tvd), (student, teacher, target, *statistics)


def backward(grads: Grads, saved: Saved, *, options: CETVDOptions, needs: Needs) -> Grads:
    student, teacher, target, *statistics = saved
    assert student is not None
    assert teacher is not None
    assert target is not None
    grad = torch.empty_like(student, memory_format=torch.contiguous_format)
    of_ce, of_tvd = (None if g is None else g.contiguous() for g in grads)
    _run(
        student,
        teacher,
        target,
        _TVD,
        ignore_index=options.ignore_index,
        statistics=statistics,
        grad=grad,
        scales=(of_ce, of_tvd),
        weights=(float(of_ce is not None), float(of_tvd is not None)),
    )
    return grad, None, None
