"""Kernels of the coefficients of hyper-connections. A thread has all numbers of its tokens: no sum leaves it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from liger_kernel._core.contract import Grads, Needs, Saved
from liger_kernel._core.shapes import as_rows, cdiv, next_power_of_2
from liger_kernel.backends.kernels import column_sums, launch
from liger_kernel.ops.mhc_sinkhorn.contract import MHCSinkhornOptions


@dataclass(frozen=True)
class Config:
    """Tiles of (HC, HC, tokens), tokens along the threads."""

    tokens: int = 32
    warps: int = 1


CONFIG = Config()


@triton.jit
def _normalise(a, eps, AXIS: tl.constexpr):
    return a / (tl.sum(a, AXIS, keep_dims=True) + eps)


@triton.jit
def _normalise_bwd(g, a, eps, AXIS: tl.constexpr):
    """The gradient of a by that of a / (sum of a + eps)."""
    total = tl.sum(a, AXIS, keep_dims=True) + eps
    return (g - tl.sum(g * a, AXIS, keep_dims=True) / total) / total


@triton.jit
def _softmax(logits, inside):
    """Of each row; 0 outside. The sum of a row is 1 or more, that of a row of padding 0."""
    z = tl.where(inside, logits, -1e38)
    e = tl.where(inside, tl.exp(z - tl.max(z, 1, keep_dims=True)), 0.0)
    return e / tl.maximum(tl.sum(e, 1, keep_dims=True), 1.0)


@triton.jit
def _positive(softmax, inside, outside, eps):
    """Where Sinkhorn's iterations begin. Rows and columns of padding have sums of their own, which are not 0."""
    return tl.where(inside, softmax + eps, tl.where(outside, 1.0, 0.0))


@triton.jit
def _after(start, pairs, eps):
    """`start` with columns and rows normalised, `pairs` times."""
    a = start
    for _ in range(0, pairs):
        a = _normalise(_normalise(a, eps, 0), eps, 1)
    return a


@triton.jit
def _vector(mix_ptr, b_ptr, alpha_ptr, first, t, mix_stride, n_tokens, hc, HC: tl.constexpr):
    """Columns `first` to `first` + hc of mix (HC, TOKENS), sigmoid(alpha mix + b), and the mask."""
    o = tl.arange(0, HC)[:, None]
    mask = (o < hc) & (t < n_tokens)[None, :]
    mix = tl.load(mix_ptr + t[None, :] * mix_stride + first + o, mask=mask, other=0.0)
    mix = mix.to(tl.float32)
    b = tl.load(b_ptr + first + o, mask=o < hc, other=0.0).to(tl.float32)
    return mix, 1.0 / (1.0 + tl.exp(-(mix * tl.load(alpha_ptr).to(tl.float32) + b))), mask


@triton.jit
def _matrix(mix_ptr, b_ptr, alpha_ptr, t, mix_stride, n_tokens, hc, HC: tl.constexpr):
    """The other columns (HC, HC, TOKENS), the softmax of alpha mix + b, its place in the matrix, and the masks of the
    matrix, of its padding, and of what is in memory."""
    o, i = tl.arange(0, HC)[:, None], tl.arange(0, HC)[None, :]
    entry = o * hc + i
    inside = (o < hc) & (i < hc)
    outside = (o >= hc) & (i >= hc)
    mask = inside[:, :, None] & (t < n_tokens)[None, None, :]
    at = mix_ptr + t[None, None, :] * mix_stride + (2 * hc + entry)[:, :, None]
    mix = tl.load(at, mask=mask, other=0.0).to(tl.float32)
    b = tl.load(b_ptr + 2 * hc + entry, mask=inside, other=0.0).to(tl.float32)[:, :, None]
    softmax = _softmax(mix * tl.load(alpha_ptr).to(tl.float32) + b, inside[:, :, None])
    return mix, softmax, entry, inside[:, :, None], outside[:, :, None], mask


@triton.jit
def _mhc_sinkhorn_fwd(
    mix_ptr,
    b_ptr,
    alpha_pre_ptr,
    alpha_post_ptr,
    alpha_res_ptr,
    pre_ptr,
    post_ptr,
    res_ptr,
    mix_stride,
    n_tokens,
    hc,
    tmax,
    pre_eps,
    eps,
    post_mult,
    HC: tl.constexpr,
    TOKENS: tl.constexpr,
):
    """One program owns TOKENS tokens."""
    t = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    place = t[None, :] * hc + tl.arange(0, HC)[:, None]
    _, h, mask = _vector(mix_ptr, b_ptr, alpha_pre_ptr, 0, t, mix_stride, n_tokens, hc, HC)
    tl.store(pre_ptr + place, h + pre_eps, mask=mask)
    _, h, mask = _vector(mix_ptr, b_ptr, alpha_post_ptr, hc, t, mix_stride, n_tokens, hc, HC)
    tl.store(post_ptr + place, post_mult * h, mask=mask)
    _, softmax, entry, inside, outside, mask = _matrix(
        mix_ptr, b_ptr, alpha_res_ptr, t, mix_stride, n_tokens, hc, HC
    )
    start = _positive(softmax, inside, outside, eps)
    a = _normalise(_after(start, tmax - 1, eps), eps, 0)
    tl.store(res_ptr + t[None, None, :] * hc * hc + entry[:, :, None], a, mask=mask)


@triton.jit
def _mhc_sinkhorn_bwd(
    mix_ptr,
    b_ptr,
    alpha_pre_ptr,
    alpha_post_ptr,
    alpha_res_ptr,
    dpre_ptr,
    dpost_ptr,
    dres_ptr,
    dmix_ptr,
    partial_ptr,
    mix_stride,
    n_tokens,
    hc,
    tmax,
    eps,
    post_mult,
    HAS_DPRE: tl.constexpr,
    HAS_DPOST: tl.constexpr,
    HAS_DRES: tl.constexpr,
    NEEDS_DMIX: tl.constexpr,
    HC: tl.constexpr,
    TOKENS: tl.constexpr,
):
    """With dz, the gradient of alpha mix + b: dmix = alpha dz, and sums over the tokens of dz and of mix dz.

    One program owns TOKENS tokens, and row i of the two (programs, M) tables in partial_ptr, fp32. The states between
    the normalisations are computed anew from the first for each: tmax^2 steps, and no memory.
    """
    t = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    o = tl.arange(0, HC)
    place = t[None, :] * hc + o[:, None]
    n_out = hc * hc + 2 * hc
    sums = partial_ptr + tl.program_id(0).to(tl.int64) * n_out
    products = sums + tl.num_programs(0).to(tl.int64) * n_out
    at = t[None, :] * n_out + o[:, None]

    mix, h, mask = _vector(mix_ptr, b_ptr, alpha_pre_ptr, 0, t, mix_stride, n_tokens, hc, HC)
    dz = tl.zeros((HC, TOKENS), tl.float32)
    if HAS_DPRE:
        dz = tl.load(dpre_ptr + place, mask=mask, other=0.0).to(tl.float32) * h * (1.0 - h)
    if NEEDS_DMIX:
        dmix = dz * tl.load(alpha_pre_ptr).to(tl.float32)
        tl.store(dmix_ptr + at, dmix.to(dmix_ptr.dtype.element_ty), mask=mask)
    tl.store(sums + o, tl.sum(dz, 1), mask=o < hc)
    tl.store(products + o, tl.sum(dz * mix, 1), mask=o < hc)

    mix, h, mask = _vector(mix_ptr, b_ptr, alpha_post_ptr, hc, t, mix_stride, n_tokens, hc, HC)
    dz = tl.zeros((HC, TOKENS), tl.float32)
    if HAS_DPOST:
        dz = tl.load(dpost_ptr + place, mask=mask, other=0.0).to(tl.float32)
        dz *= post_mult * h * (1.0 - h)
    if NEEDS_DMIX:
        dmix = dz * tl.load(alpha_post_ptr).to(tl.float32)
        tl.store(dmix_ptr + at + hc, dmix.to(dmix_ptr.dtype.element_ty), mask=mask)
    tl.store(sums + hc + o, tl.sum(dz, 1), mask=o < hc)
    tl.store(products + hc + o, tl.sum(dz * mix, 1), mask=o < hc)

    mix, softmax, entry, inside, outside, mask = _matrix(
        mix_ptr, b_ptr, alpha_res_ptr, t, mix_stride, n_tokens, hc, HC
    )
    dz = tl.zeros((HC, HC, TOKENS), tl.float32)
    if HAS_DRES:
        place = t[None, None, :] * hc * hc + entry[:, :, None]
        g = tl.load(dres_ptr + place, mask=mask, other=0.0).to(tl.float32)
        start = _positive(softmax, inside, outside, eps)
        g = _normalise_bwd(g, _after(start, tmax - 1, eps), eps, 0)
        for back in range(1, tmax):
            a = _after(start, tmax - 1 - back, eps)
            g = _normalise_bwd(g, _normalise(a, eps, 0), eps, 1)
            g = _normalise_bwd(g, a, eps, 0)
        g = tl.where(inside, g, 0.0)
        dz = softmax * (g - tl.sum(g * softmax, 1, keep_dims=True))
    if NEEDS_DMIX:
        dmix = dz * tl.load(alpha_res_ptr).to(tl.float32)
        at = dmix_ptr + t[None, None, :] * n_out + (2 * hc + entry)[:, :, None]
        tl.store(at, dmix.to(dmix_ptr.dtype.element_ty), mask=mask)
    square = (o < hc)[:, None] & (o < hc)[None, :]
    tl.store(sums + 2 * hc + entry, tl.sum(dz, 2), mask=square)
    tl.store(products + 2 * hc + entry, tl.sum(dz * mix, 2), mask=square)


def _streams(n_columns: int) -> int:
    return math.isqrt(n_columns + 1) - 1


def _tile(hc: int) -> dict[str, Any]:
    return {"HC": next_power_of_2(hc), "TOKENS": CONFIG.tokens, "num_warps": CONFIG.warps}


def forward(
    mix: Tensor,
    b: Tensor,
    alpha_pre: Tensor,
    alpha_post: Tensor,
    alpha_res: Tensor,
    *,
    options: MHCSinkhornOptions,
    needs: Needs,
) -> tuple[tuple[Tensor, Tensor, Tensor], Saved]:
    rows, b = as_rows(mix), b.contiguous()
    hc, tokens = _streams(rows.shape[1]), mix.shape[:-1]
    shapes = ((hc,), (hc,), (hc, hc))
    h_pre, h_post, h_res = (mix.new_empty(*tokens, *s, dtype=torch.float32) for s in shapes)
    alphas = (alpha_pre, alpha_post, alpha_res)
    if h_pre.numel():
        launch(
            _mhc_sinkhorn_fwd,
            (cdiv(rows.shape[0], CONFIG.tokens),),
            *(rows, b, *alphas, h_pre, h_post, h_res, rows.stride(0), rows.shape[0], hc),
            *(options.tmax, options.pre_eps, options.sinkhorn_eps, options.post_mult),
            **_tile(hc),
        )
    return (h_pre, h_post, h_res), (rows, b, *alphas)


def backward(grads: Any, saved: Any, *, options: MHCSinkhornOptions, needs: Needs) -> Grads:
    rows, b, *alphas = saved
    n_tokens, n_out = rows.shape
    hc = _streams(n_out)
    tokens = next(g.shape[: g.ndim - 1 - (i == 2)] for i, g in enumerate(grads) if g is not None)
    dmix = rows.new_empty(*tokens, n_out) if needs[0] else None
    programs = max(1, cdiv(n_tokens, CONFIG.tokens))
    partial = rows.new_empty(2, programs, n_out, dtype=torch.float32)
    launch(
        _mhc_sinkhorn_bwd,
        (programs,),
        *(rows, b, *alphas),
        *(None if g is None else g.contiguous() for g in grads),
        *(dmix, partial, rows.stride(0), n_tokens, hc),
        *(options.tmax, options.sinkhorn_eps, options.post_mult),
        HAS_DPRE=grads[0] is not None,
        HAS_DPOST=grads[1] is not None,
        HAS_DRES=grads[2] is not None,
        NEEDS_DMIX=needs[0],
        **_tile(hc),
    )
    if not any(needs[1:]):
        return dmix, None, None, None, None
    db, products = column_sums(partial, [b.dtype, torch.float32])
    of_alphas = (
        part.sum().to(alpha.dtype).view(alpha.shape) if need else None
        for part, alpha, need in zip(
            products.split((hc, hc, hc * hc)), alphas, needs[2:], strict=True
        )
    )
    return dmix, db if needs[1] else None, *of_alphas
