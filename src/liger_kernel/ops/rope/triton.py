"""Rotary position embedding: q and k in one launch, 2 n elements moved; backward is the same kernel with -sin."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from liger_kernel._core.contract import Grads, Needs, Saved
from liger_kernel._core.shapes import cdiv, next_power_of_2
from liger_kernel.backends.kernels import launch
from liger_kernel.ops.rope.contract import RopeOptions


@dataclass(frozen=True)
class Config:
    """A program owns all heads of `tokens` tokens and loops over them, `heads` at a time."""

    tokens: int
    heads: tuple[int, ...]
    block_half: int
    block_rest: int
    warps: int = 4

    @staticmethod
    @functools.cache
    def of(
        n_heads: tuple[int, ...],
        head_dim: int,
        rotary_dim: int,
        elements: int = 4096,
        whole: tuple[bool, ...] = (False, False),
    ) -> Config:
        """`elements`: of a tile, unless it has to hold `whole` tokens of one of the tensors."""
        block_half = next_power_of_2(rotary_dim // 2)
        rest = head_dim - rotary_dim
        block_rest = next_power_of_2(rest) if rest else 0
        widest = max(2 * block_half, block_rest)
        budget = max(1, elements // widest)  # (token, head) rows in one tile
        most = (1 << 16 if w else budget for w in whole)
        heads = tuple(min(next_power_of_2(n), m) for n, m in zip(n_heads, most, strict=False))
        tokens = min(16, max(1, budget // max(heads)))
        warps = min(16, max(4, tokens * max(heads) * widest // 1024))
        return Config(tokens, heads, block_half, block_rest, warps)


@triton.jit
def load_angles(
    cos_ptr,
    sin_ptr,
    batch,
    position,
    token_mask,
    cos_table,
    cos_batch,
    cos_token,
    ROTARY: tl.constexpr,
    COS_STEP: tl.constexpr,
    TIME: tl.constexpr,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    IN_TURNS: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
):
    """(TOKENS, 1, BLOCK_HALF) cosines and sines.

    TIME, HEIGHT, WIDTH: numbers of columns that read the first, second and third table; all 0 where there is one table.
    """
    half = tl.arange(0, BLOCK_HALF)[None, None, :]
    at = (batch * cos_batch + position * cos_token)[:, None, None] + half * COS_STEP
    if TIME + HEIGHT + WIDTH:
        if IN_TURNS:
            more = half < 3 * tl.where(half % 3 == 1, HEIGHT, WIDTH)
            table = tl.where(more, half % 3, 0)
        else:
            table = (half >= TIME).to(tl.int32) + (half >= TIME + HEIGHT).to(tl.int32)
        at += table.to(tl.int64) * cos_table
    mask = token_mask[:, None, None] & (half < ROTARY // 2)
    cos = tl.load(cos_ptr + at, mask=mask, other=0.0).to(tl.float32)
    return cos, tl.load(sin_ptr + at, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def load_pairs(
    rows,
    row_mask,
    stride,
    ROTARY: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    TOKENS: tl.constexpr,
    HEADS: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
):
    """Both columns of each pair, (TOKENS, HEADS, BLOCK_HALF) in fp32, of the rows that `rows` points to."""
    if INTERLEAVED:
        cols = tl.arange(0, 2 * BLOCK_HALF)[None, None, :]
        x = tl.load(rows + cols * stride, mask=row_mask & (cols < ROTARY), other=0.0)
        a, b = tl.split(tl.reshape(x.to(tl.float32), (TOKENS, HEADS, BLOCK_HALF, 2)))
    else:
        cols = tl.arange(0, BLOCK_HALF)[None, None, :]
        mask = row_mask & (cols < ROTARY // 2)
        a = tl.load(rows + cols * stride, mask=mask, other=0.0).to(tl.float32)
        b = tl.load(rows + (cols + ROTARY // 2) * stride, mask=mask, other=0.0).to(tl.float32)
    return a, b


@triton.jit
def store_pairs(
    rows,
    row_mask,
    stride,
    a,
    b,
    ROTARY: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    TOKENS: tl.constexpr,
    HEADS: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
):
    """What `load_pairs` loads, in the dtype of the pointers."""
    dtype = rows.dtype.element_ty
    if INTERLEAVED:
        cols = tl.arange(0, 2 * BLOCK_HALF)[None, None, :]
        x = tl.reshape(tl.join(a, b), (TOKENS, HEADS, 2 * BLOCK_HALF))
        tl.store(rows + cols * stride, x.to(dtype), mask=row_mask & (cols < ROTARY))
    else:
        cols = tl.arange(0, BLOCK_HALF)[None, None, :]
        mask = row_mask & (cols < ROTARY // 2)
        tl.store(rows + cols * stride, a.to(dtype), mask=mask)
        tl.store(rows + (cols + ROTARY // 2) * stride, b.to(dtype), mask=mask)


@triton.jit
def _rotate(
    x_ptr,
    out_ptr,
    batch,
    position,
    token_mask,
    cos,
    sin,
    x_batch,
    x_token,
    x_head,
    x_col,
    out_batch,
    out_token,
    out_head,
    out_col,
    N_HEADS: tl.constexpr,
    D: tl.constexpr,
    ROTARY: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    TOKENS: tl.constexpr,
    HEADS: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    BLOCK_REST: tl.constexpr,
):
    """out = x rotated by (TOKENS, 1, BLOCK_HALF) cosines and sines, for all heads of TOKENS tokens."""
    x_tokens = x_ptr + (batch * x_batch + position * x_token)[:, None, None]
    out_tokens = out_ptr + (batch * out_batch + position * out_token)[:, None, None]
    for start in range(0, N_HEADS, HEADS):
        heads = (start + tl.arange(0, HEADS)).to(tl.int64)
        row_mask = token_mask[:, None, None] & (heads < N_HEADS)[None, :, None]
        x_rows = x_tokens + (heads * x_head)[None, :, None]
        out_rows = out_tokens + (heads * out_head)[None, :, None]
        a, b = load_pairs(x_rows, row_mask, x_col, ROTARY, INTERLEAVED, TOKENS, HEADS, BLOCK_HALF)
        store_pairs(
            out_rows,
            row_mask,
            out_col,
            a * cos - b * sin,
            b * cos + a * sin,
            ROTARY,
            INTERLEAVED,
            TOKENS,
            HEADS,
            BLOCK_HALF,
        )
        if BLOCK_REST:
            cols = ROTARY + tl.arange(0, BLOCK_REST)[None, None, :]
            mask = row_mask & (cols < D)
            x = tl.load(x_rows + cols * x_col, mask=mask, other=0.0)
            tl.store(out_rows + cols * out_col, x, mask=mask)


@triton.jit
def _rope(
    q_ptr,
    k_ptr,
    q_out_ptr,
    k_out_ptr,
    cos_ptr,
    sin_ptr,
    sign,
    n_tokens,
    seq,
    cos_table,
    cos_batch,
    cos_token,
    q_batch,
    q_token,
    q_head,
    q_col,
    q_out_batch,
    q_out_token,
    q_out_head,
    q_out_col,
    k_batch,
    k_token,
    k_head,
    k_col,
    k_out_batch,
    k_out_token,
    k_out_head,
    k_out_col,
    Q_HEADS: tl.constexpr,
    K_HEADS: tl.constexpr,
    D: tl.constexpr,
    ROTARY: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    COS_STEP: tl.constexpr,
    TIME: tl.constexpr,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    IN_TURNS: tl.constexpr,
    TOKENS: tl.constexpr,
    Q_BLOCK: tl.constexpr,
    K_BLOCK: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    BLOCK_REST: tl.constexpr,
):
    """(a, b) -> (a cos - b sin, b cos + a sin), sin times `sign`. One program owns all heads of TOKENS tokens."""
    tokens = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    token_mask = tokens < n_tokens
    batch = (tokens // seq).to(tl.int64)
    position = (tokens % seq).to(tl.int64)
    cos, sin = load_angles(
        cos_ptr,
        sin_ptr,
        batch,
        position,
        token_mask,
        cos_table,
        cos_batch,
        cos_token,
        ROTARY,
        COS_STEP,
        TIME,
        HEIGHT,
        WIDTH,
        IN_TURNS,
        BLOCK_HALF,
    )
    sin *= sign
    _rotate(
        q_ptr,
        q_out_ptr,
        batch,
        position,
        token_mask,
        cos,
        sin,
        q_batch,
        q_token,
        q_head,
        q_col,
        q_out_batch,
        q_out_token,
        q_out_head,
        q_out_col,
        Q_HEADS,
        D,
        ROTARY,
        INTERLEAVED,
        TOKENS,
        Q_BLOCK,
        BLOCK_HALF,
        BLOCK_REST,
    )
    if K_HEADS:
        _rotate(
            k_ptr,
            k_out_ptr,
            batch,
            position,
            token_mask,
            cos,
            sin,
            k_batch,
            k_token,
            k_head,
            k_col,
            k_out_batch,
            k_out_token,
            k_out_head,
            k_out_col,
            K_HEADS,
            D,
            ROTARY,
            INTERLEAVED,
            TOKENS,
            K_BLOCK,
            BLOCK_HALF,
            BLOCK_REST,
        )


def strides_of(x: Tensor, unsqueeze_dim: int) -> tuple[int, ...]:
    """Strides of (batch, token, head, column)."""
    batch, second, third, column = x.stride()
    return (batch, third, second, column) if unsqueeze_dim == 1 else (batch, second, third, column)


def _rotated(
    tensors: Sequence[Tensor | None], cos: Tensor, sin: Tensor, sign: float, options: RopeOptions
) -> list[Tensor | None]:
    """Each of the one or two tensors rotated by sign * the angles, in its own memory layout."""
    unsqueeze_dim, rotary_dim = options.unsqueeze_dim, options.rotary_dim
    interleaved = options.interleaved
    section = options.mrope_section or (0, 0, 0)
    given = [x for x in tensors if x is not None]
    outs = [torch.empty_like(x) for x in given]
    first, last = given[0], given[-1]
    head_dim, seq = first.shape[3], first.shape[3 - unsqueeze_dim]
    n_tokens = first.shape[0] * seq
    heads = tuple([x.shape[unsqueeze_dim] for x in given])
    config = Config.of(heads, head_dim, rotary_dim)
    strides: tuple[int, ...] = ()
    for x, out in zip(given, outs, strict=True):
        strides += strides_of(x, unsqueeze_dim) + strides_of(out, unsqueeze_dim)
    if n_tokens:
        launch(
            _rope,
            (cdiv(n_tokens, config.tokens),),
            first,
            last,
            outs[0],
            outs[-1],
            cos,
            sin,
            sign,
            n_tokens,
            seq,
            cos.stride(0),
            0 if cos.shape[-3] == 1 else cos.stride(-3),
            cos.stride(-2),
            *strides,
            *(() if len(given) == 2 else (0,) * 8),
            Q_HEADS=heads[0],
            K_HEADS=heads[1] if len(given) == 2 else 0,
            D=head_dim,
            ROTARY=rotary_dim,
            INTERLEAVED=interleaved,
            COS_STEP=cos.stride(-1) * (2 if interleaved and cos.shape[-1] >= rotary_dim else 1),
            TIME=section[0],
            HEIGHT=section[1],
            WIDTH=section[2],
            IN_TURNS=options.mrope_interleaved,
            TOKENS=config.tokens,
            Q_BLOCK=config.heads[0],
            K_BLOCK=config.heads[-1],
            BLOCK_HALF=config.block_half,
            BLOCK_REST=config.block_rest,
            num_warps=config.warps,
        )
    rotated = iter(outs)
    return [None if x is None else next(rotated) for x in tensors]


def forward(
    q: Tensor, k: Tensor | None, cos: Tensor, sin: Tensor, *, options: RopeOptions, needs: Needs
) -> tuple[Grads, Saved]:
    outs = _rotated((q, k), cos, sin, 1.0, options)
    return tuple(outs), (cos, sin)


def backward(grads: Grads, saved: Saved, *, options: RopeOptions, needs: Needs) -> Grads:
    wanted = [grad if need else None for grad, need in zip(grads, needs, strict=False)]
    if all(grad is None for grad in wanted):
        return None, None, None, None
    dq, dk = _rotated(wanted, *saved, -1.0, options)
    return dq, dk, None, None
