"""Kernels of the GRPO family on given logits: (R, V) read once in forward; in backward read once more, and written.

Where the loss is summed in forward, the gradient is written there, right after the row was read: 2 V elements moved.
"""

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
from liger_kernel.backends.kernels import launch
from liger_kernel.backends.records import DeviceFacts
from liger_kernel.ops.grpo_loss.contract import CLIPPED, NOT_COUNTED, GRPOLossOptions

_NOT_COUNTED = tl.constexpr(NOT_COUNTED)
_LARGEST_LOG = tl.constexpr(80.0)
_BLOCK = 8192  # columns: 16 KB of a row in 16 bits
_NAN = tl.constexpr(tl.PropagateNan.ALL)


@dataclass(frozen=True)
class Config:
    """A program reads a row in blocks, `stages` of them in flight. In backward it owns one block of a row.

    Nothing here is measured yet: `writes` as for cross entropy, whose rows stay in the cache if each processor has one
    under way; a forward that only reads needs loads in flight, and no cache. A thread has 32 elements of a block, in
    backward 16.
    """

    block: int
    warps: int
    stages: int

    @staticmethod
    @functools.cache
    def of(n_cols: int, itemsize: int, writes: bool, facts: DeviceFacts) -> Config:
        block = min(next_power_of_2(n_cols), 4 * _BLOCK if writes else _BLOCK)
        stages = 1
        if facts.architecture == "hopper" and n_cols > block:
            stages = facts.stages(3, block * itemsize)
        if stages == 1:
            block = min(block, _BLOCK)
        return Config(block, min(facts.most_warps, 16, max(4, block // 1024)), stages)


@triton.jit
def _exp(x):
    return tl.exp(tl.minimum(x, _LARGEST_LOG, propagate_nan=_NAN))


@triton.jit
def _loss_and_slope(
    logp, log_ratio, advantage, eps_low, eps_high, delta, t_pos, t_neg, FORM: tl.constexpr
):
    """A loss of a token, its derivative in logp, and whether it was clipped; formulas: `reference.token_terms`."""
    ratio = _exp(log_ratio)
    clipped = 0.0
    if FORM == "cispo":
        clipped = tl.where((ratio > eps_high) & (advantage > 0.0), 1.0, 0.0)
        slope = -tl.minimum(ratio, eps_high, propagate_nan=_NAN) * advantage
        loss = slope * logp
    elif FORM == "sapo":
        t = tl.where(advantage > 0.0, t_pos, t_neg)
        gate = 1.0 / (1.0 + _exp(-t * (ratio - 1.0)))
        loss = -4.0 / t * gate * advantage
        slope = -4.0 * gate * (1.0 - gate) * ratio * advantage
    elif FORM == "vespo":
        slope = -advantage
        loss = slope * logp
    else:
        low, high = 1.0 - eps_low, 1.0 + eps_high
        too_low = (ratio < low) & (advantage < 0.0)
        too_high = (ratio > high) & (advantage > 0.0)
        clipped = tl.where(too_low | too_high, 1.0, 0.0)
        bounded = tl.maximum(ratio, low, propagate_nan=_NAN)
        bounded = tl.minimum(bounded, high, propagate_nan=_NAN)
        within = tl.minimum(ratio, delta)
        first = within * advantage <= bounded * advantage
        loss = -tl.where(first, within, bounded) * advantage
        # the smaller one moves with the ratio where it is the ratio
        moves = tl.where(first, within, bounded) == ratio
        slope = tl.where(moves, -ratio * advantage, 0.0)
    return loss, slope, clipped


@triton.jit
def _forward(
    x_ptr,
    id_ptr,
    old_ptr,
    ref_ptr,
    advantage_ptr,
    weight_ptr,
    sum_weight_ptr,
    loss_ptr,
    kl_ptr,
    clipped_ptr,
    slope_ptr,
    top_ptr,
    log_total_ptr,
    grad_ptr,
    x_stride,
    n_cols,
    cool,
    beta,
    eps_low,
    eps_high,
    delta,
    t_pos,
    t_neg,
    FORM: tl.constexpr,
    BIAS_CORRECTION: tl.constexpr,
    WRITE_GRAD: tl.constexpr,
    BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Loss of one token, whose row of logits this program reads; what is not there, or not wanted, is None.

    The derivative of the loss in the log-probability, and the normaliser, are for backward; with WRITE_GRAD the
    gradient of the logits is written at once.
    """
    row = tl.program_id(0).to(tl.int64)
    token = tl.load(id_ptr + row)
    x_row = x_ptr + row * x_stride
    cols = tl.arange(0, BLOCK)
    grad_row = grad_ptr
    if WRITE_GRAD:
        grad_row = grad_ptr + row * n_cols
    if token == _NOT_COUNTED:
        tl.store(loss_ptr + row, 0.0)
        if kl_ptr is not None:
            tl.store(kl_ptr + row, 0.0)
        if clipped_ptr is not None:
            tl.store(clipped_ptr + row, 0.0)
        if WRITE_GRAD:
            zeros = tl.zeros((BLOCK,), tl.float32).to(grad_ptr.dtype.element_ty)
            for start in range(0, n_cols, BLOCK):
                tl.store(grad_row + start + cols, zeros, mask=start + cols < n_cols)
        return

    in_range = (token >= 0) & (token < n_cols)
    x_y = tl.load(x_row + tl.where(in_range, token, 0)).to(tl.float32)
    x_y = tl.where(in_range, x_y, float("nan"))
    top = float("-inf")
    total = 0.0  # sum of exp((x - top) / temperature)
    for start in tl.range(0, n_cols, BLOCK, num_stages=STAGES):
        x = tl.load(
            x_row + start + cols,
            mask=start + cols < n_cols,
            other=float("-inf"),
            eviction_policy="evict_last" if WRITE_GRAD else "evict_first",
        ).to(tl.float32)
        new_top = tl.maximum(top, tl.max(x, 0))
        # as long as every logit is -inf (classes that are masked out), exp(x - top) would be NaN
        anchor = tl.where(new_top == float("-inf"), 0.0, new_top)
        total = total * tl.exp((top - anchor) * cool) + tl.sum(tl.exp((x - anchor) * cool), 0)
        top = new_top
    log_total = tl.log(total)
    logp = (x_y - top) * cool - log_total

    loss = logp
    slope = 1.0
    if FORM != "logps":
        log_ratio = 0.0
        if old_ptr is not None:
            log_ratio = logp - tl.load(old_ptr + row).to(tl.float32)
        advantage = tl.load(advantage_ptr + row).to(tl.float32)
        loss, slope, clipped = _loss_and_slope(
            logp, log_ratio, advantage, eps_low, eps_high, delta, t_pos, t_neg, FORM
        )
        if weight_ptr is not None:
            weight = tl.load(weight_ptr + row).to(tl.float32)
            loss *= weight
            slope *= weight
        if kl_ptr is not None:
            log_gap = 0.0
            if ref_ptr is not None:
                log_gap = tl.load(ref_ptr + row).to(tl.float32) - logp
            gap = _exp(log_gap)
            kl = gap - log_gap - 1.0
            kl_slope = 1.0 - gap
            if BIAS_CORRECTION:
                ratio = _exp(log_ratio)
                kl_slope = (kl_slope + kl) * ratio
                kl *= ratio
            loss += beta * kl
            slope += beta * kl_slope
            tl.store(kl_ptr + row, kl)
        tl.store(clipped_ptr + row, clipped)
    if sum_weight_ptr is not None:
        sum_weight = tl.load(sum_weight_ptr + row).to(tl.float32)
        loss *= sum_weight
        slope *= sum_weight
    slope = tl.where(in_range, slope, float("nan"))
    tl.store(loss_ptr + row, loss)
    if slope_ptr is not None:
        tl.store(slope_ptr + row, slope)
        tl.store(top_ptr + row, top)
        tl.store(log_total_ptr + row, log_total)
    if WRITE_GRAD:
        n_blocks = tl.cdiv(n_cols, BLOCK)
        for i in tl.range(0, n_blocks, num_stages=STAGES):
            # last block first: it is the one most likely still in the cache
            start = (n_blocks - 1 - i) * BLOCK
            mask = start + cols < n_cols
            x = tl.load(x_row + start + cols, mask=mask, other=0.0, eviction_policy="evict_first")
            p = tl.exp((x.to(tl.float32) - top) * cool - log_total)
            g = slope * cool * (tl.where(start + cols == token, 1.0, 0.0) - p)
            g = g.to(grad_ptr.dtype.element_ty)
            tl.store(grad_row + start + cols, g, mask=mask, eviction_policy="evict_first")


@triton.jit
def _backward(
    x_ptr,
    grad_ptr,
    id_ptr,
    upstream_ptr,
    slope_ptr,
    top_ptr,
    log_total_ptr,
    x_stride,
    grad_stride,
    upstream_stride,
    n_cols,
    cool,
    BLOCK: tl.constexpr,
):
    """grad = upstream slope ([v = token] - p) / temperature of a block of a row; grad_ptr may be x_ptr."""
    n_parts = tl.cdiv(n_cols, BLOCK)
    program = tl.program_id(0)
    row = (program // n_parts).to(tl.int64)
    cols = (program % n_parts) * BLOCK + tl.arange(0, BLOCK)
    mask = cols < n_cols
    token = tl.load(id_ptr + row)
    g = tl.zeros((BLOCK,), tl.float32)
    if token != _NOT_COUNTED:
        factor = tl.load(upstream_ptr + row * upstream_stride).to(tl.float32)
        factor *= tl.load(slope_ptr + row) * cool
        x = tl.load(x_ptr + row * x_stride + cols, mask=mask, other=0.0).to(tl.float32)
        p = tl.exp((x - tl.load(top_ptr + row)) * cool - tl.load(log_total_ptr + row))
        g = factor * (tl.where(cols == token, 1.0, 0.0) - p)
    g = g.to(grad_ptr.dtype.element_ty)
    tl.store(grad_ptr + row * grad_stride + cols, g, mask=mask, eviction_policy="evict_first")


def forward(
    logits: Tensor,
    token_ids: Tensor,
    old_logps: Tensor | None,
    ref_logps: Tensor | None,
    advantages: Tensor | None,
    weight: Tensor | None,
    sum_weight: Tensor | None,
    *,
    options: GRPOLossOptions,
    needs: Needs,
) -> tuple[tuple[Tensor, Tensor | None, Tensor | None], Saved]:
    o, rows = options, as_rows(logits)
    n_rows, n_cols = rows.shape
    # in 16-bit floats of the narrow kind the gradient of a mean would be lost before a gradient scaler sees it
    now = needs[0] and sum_weight is not None and not o.in_place and rows.dtype != torch.float16
    new = functools.partial(torch.empty, n_rows, dtype=torch.float32, device=rows.device)
    loss, has_loss = new(), o.loss_type != "logps"
    kl, clipped = new() if has_loss and o.beta else None, new() if has_loss else None
    later = needs[0] and not now
    of_rows = [new(), new(), new()] if later else [None, None, None]
    grad = torch.empty(rows.shape, dtype=rows.dtype, device=rows.device) if now else None
    if n_rows:
        config = Config.of(n_cols, rows.element_size(), now, facts_of(rows.device))
        per_token = (old_logps, ref_logps, advantages, weight, sum_weight)
        launch(
            _forward,
            (n_rows,),
            *(rows, token_ids.contiguous()),
            *(None if t is None else t.contiguous() for t in per_token),
            *(loss, kl, clipped, *of_rows, grad, rows.stride(0), n_cols, 1.0 / o.temperature),
            *map(float, (o.beta, o.epsilon_low, o.epsilon_high)),
            float("inf") if o.delta is None else float(o.delta),
            *map(float, (o.sapo_temperature_pos, o.sapo_temperature_neg)),
            FORM="clip" if o.loss_type in CLIPPED else o.loss_type,
            BIAS_CORRECTION=o.use_bias_correction_kl,
            WRITE_GRAD=now,
            BLOCK=config.block,
            STAGES=config.stages,
            num_warps=config.warps,
        )
    saved: Saved = (grad,) if now else (rows, token_ids, *of_rows)
    return (loss if sum_weight is None else loss.sum(), kl, clipped), saved


def backward(grads: Grads, saved: Saved, *, options: GRPOLossOptions, needs: Needs) -> Grads:
    rows, token_ids, *of_rows = saved
    assert rows is not None
    assert token_ids is not None
    n_rows, n_cols = rows.shape
    if options.in_place and rows.is_contiguous():
        grad = rows.detach()
        # whoever saved the logits for a backward learns that they are gone
        torch.autograd.graph.increment_version(grad)
    else:
        grad = torch.empty(rows.shape, dtype=rows.dtype, device=rows.device)
    block = min(next_power_of_2(n_cols), _BLOCK)
    if rows.numel():
        upstream = grads[0].expand(n_rows)
        launch(
            _backward,
            (n_rows * cdiv(n_cols, block),),
            *(rows, grad, token_ids.contiguous(), upstream, *of_rows),
            *(
                rows.stride(0),
                grad.stride(0),
                upstream.stride(0),
                n_cols,
                1.0 / options.temperature,
            ),
            BLOCK=block,
            num_warps=max(4, block // 512),
        )
    return grad, *(None,) * 6
