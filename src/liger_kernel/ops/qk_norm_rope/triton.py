"""RMSNorm and rotary embedding of heads: q and k in one launch, 2 n elements moved.

Backward is one launch, too, which moves 3 n elements: it turns the gradients back, norms the heads once more, and sums
the gradients of the weights by program; these sums are added up in a fixed order.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from liger_kernel._core.contract import Grads, Needs, Saved
from liger_kernel._core.shapes import cdiv
from liger_kernel.backends import facts_of
from liger_kernel.backends.kernels import column_sums, launch
from liger_kernel.ops.qk_norm_rope.contract import QKNormRopeOptions
from liger_kernel.ops.rope.triton import Config, load_angles, load_pairs, store_pairs, strides_of

# Elements of a tile: in backward three times in registers, as x, its gradient and the weight's sums. On an H200, heads
# of Qwen3-8B: forward 0.048 ms, 0.053 with 2048; backward and its sums 0.072, 0.080 with 2048
FORWARD_TILE, BACKWARD_TILE = 1024, 4096
PROGRAMS = 3  # of backward, per processor and tensor: of OLMo 2 0.130 ms, with two 0.165, with four 0.143 (H200)


@triton.jit
def _load_rest(
    rows, row_mask, stride, ROTARY: tl.constexpr, D: tl.constexpr, BLOCK_REST: tl.constexpr
):
    """The columns that are not rotated, in fp32; a zero where there are none."""
    if BLOCK_REST:
        cols = ROTARY + tl.arange(0, BLOCK_REST)[None, None, :]
        rest = tl.load(rows + cols * stride, mask=row_mask & (cols < D), other=0.0).to(tl.float32)
    else:
        rest = tl.zeros((1, 1, 1), tl.float32)
    return rest


@triton.jit
def _store_rest(
    rows, row_mask, stride, rest, ROTARY: tl.constexpr, D: tl.constexpr, BLOCK_REST: tl.constexpr
):
    if BLOCK_REST:
        cols = ROTARY + tl.arange(0, BLOCK_REST)[None, None, :]
        tl.store(rows + cols * stride, rest.to(rows.dtype.element_ty), mask=row_mask & (cols < D))


@triton.jit
def _load_weight(
    w_ptr,
    offset,
    N_HEADS: tl.constexpr,
    D: tl.constexpr,
    ROTARY: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HEADS: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    BLOCK_REST: tl.constexpr,
):
    """offset + weight, (1, HEADS, .) like the columns of a token: pairs, and the rest."""
    if HAS_WEIGHT:
        heads = tl.arange(0, HEADS)[None, :, None]
        rows, mask = w_ptr + heads * D, heads < N_HEADS
        a, b = load_pairs(rows, mask, 1, ROTARY, INTERLEAVED, 1, HEADS, BLOCK_HALF)
        a, b = a + offset, b + offset
        rest = _load_rest(rows, mask, 1, ROTARY, D, BLOCK_REST) + offset
    else:
        a = tl.full((1, 1, 1), 1.0, tl.float32)
        b = a
        rest = a
    return a, b, rest


@triton.jit
def _sum(a, b, rest, WHOLE: tl.constexpr):
    """Over the columns, (TOKENS, HEADS, 1), or of WHOLE tokens, (TOKENS, 1, 1)."""
    total = tl.sum(a, 2) + tl.sum(b, 2) + tl.sum(rest, 2)
    if WHOLE:
        total = tl.sum(total, 1)[:, None]
    return total[:, :, None]


@triton.jit
def _rounded(a, b, rest, ROUND: tl.constexpr, dtype: tl.constexpr):
    if ROUND:
        a, b = a.to(dtype).to(tl.float32), b.to(dtype).to(tl.float32)
        rest = rest.to(dtype).to(tl.float32)
    return a, b, rest


@triton.jit
def _norm_rope(
    x_ptr, out_ptr, w_ptr, cos_ptr, sin_ptr, eps, offset, n_tokens, seq, cos_batch, cos_token, x_batch,
    x_token, x_head, x_col, out_batch, out_token, out_head, out_col, N_HEADS: tl.constexpr, D: tl.constexpr,
    ROTARY: tl.constexpr, INTERLEAVED: tl.constexpr, COS_STEP: tl.constexpr, HAS_WEIGHT: tl.constexpr,
    WHOLE: tl.constexpr, ROUND: tl.constexpr, TOKENS: tl.constexpr, HEADS: tl.constexpr,
    BLOCK_HALF: tl.constexpr, BLOCK_REST: tl.constexpr,
):  # fmt: skip
    """One of both tensors. A program owns all heads of TOKENS tokens; of WHOLE ones, HEADS are all."""
    tokens = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    token_mask = tokens < n_tokens
    batch = (tokens // seq).to(tl.int64)
    position = (tokens % seq).to(tl.int64)
    cos, sin = load_angles(
        cos_ptr, sin_ptr, batch, position, token_mask, 0, cos_batch, cos_token,
        ROTARY, COS_STEP, 0, 0, 0, False, BLOCK_HALF,
    )  # fmt: skip
    w_a, w_b, w_rest = _load_weight(
        w_ptr, offset, N_HEADS if WHOLE else 1, D, ROTARY, INTERLEAVED, HAS_WEIGHT, HEADS if WHOLE else 1,
        BLOCK_HALF, BLOCK_REST,
    )  # fmt: skip
    dtype = x_ptr.dtype.element_ty
    x_tokens = x_ptr + (batch * x_batch + position * x_token)[:, None, None]
    out_tokens = out_ptr + (batch * out_batch + position * out_token)[:, None, None]
    for start in range(0, N_HEADS, HEADS):
        heads = (start + tl.arange(0, HEADS)).to(tl.int64)[None, :, None]
        mask = token_mask[:, None, None] & (heads < N_HEADS)
        rows, out_rows = x_tokens + heads * x_head, out_tokens + heads * out_head
        a, b = load_pairs(rows, mask, x_col, ROTARY, INTERLEAVED, TOKENS, HEADS, BLOCK_HALF)
        rest = _load_rest(rows, mask, x_col, ROTARY, D, BLOCK_REST)
        count: tl.constexpr = D * N_HEADS if WHOLE else D
        rstd = tl.rsqrt(_sum(a * a, b * b, rest * rest, WHOLE) / count + eps)
        a, b, rest = _rounded(a * rstd, b * rstd, rest * rstd, ROUND, dtype)
        a, b = a * w_a, b * w_b
        store_pairs(
            out_rows, mask, out_col, a * cos - b * sin, b * cos + a * sin,
            ROTARY, INTERLEAVED, TOKENS, HEADS, BLOCK_HALF,
        )  # fmt: skip
        _store_rest(out_rows, mask, out_col, rest * w_rest, ROTARY, D, BLOCK_REST)


@triton.jit
def _norm_rope_bwd(
    x_ptr, g_ptr, dx_ptr, w_ptr, partial_ptr, cos_ptr, sin_ptr, eps, offset, n_tokens, seq, cos_batch,
    cos_token, x_batch, x_token, x_head, x_col, g_batch, g_token, g_head, g_col, dx_batch, dx_token, dx_head,
    dx_col, N_HEADS: tl.constexpr, D: tl.constexpr, ROTARY: tl.constexpr, INTERLEAVED: tl.constexpr,
    COS_STEP: tl.constexpr, HAS_WEIGHT: tl.constexpr, WHOLE: tl.constexpr, ROUND: tl.constexpr,
    NEEDS_DX: tl.constexpr, NEEDS_DW: tl.constexpr, TOKENS: tl.constexpr, HEADS: tl.constexpr,
    BLOCK_HALF: tl.constexpr, BLOCK_REST: tl.constexpr,
):  # fmt: skip
    """dx = rstd (m - n mean(m n)) and dw = sum of y n, with n = x rstd, y the gradient turned back, m = y (offset + w).

    Programs are persistent: each loops over the tiles pid, pid + programs, ..., accumulates dw in registers, and owns
    row `pid` of partial_ptr, fp32.
    """
    pid = tl.program_id(0)
    w_heads: tl.constexpr = HEADS if WHOLE else 1
    w_a, w_b, w_rest = _load_weight(
        w_ptr, offset, N_HEADS if WHOLE else 1, D, ROTARY, INTERLEAVED, HAS_WEIGHT, w_heads, BLOCK_HALF, BLOCK_REST,
    )  # fmt: skip
    dw_a = tl.zeros((TOKENS, HEADS, BLOCK_HALF), tl.float32)
    dw_b = tl.zeros((TOKENS, HEADS, BLOCK_HALF), tl.float32)
    dw_rest = tl.zeros((TOKENS, HEADS, BLOCK_REST if BLOCK_REST else 1), tl.float32)
    dtype = x_ptr.dtype.element_ty
    for tile in tl.range(pid, tl.cdiv(n_tokens, TOKENS), tl.num_programs(0)):
        tokens = tile * TOKENS + tl.arange(0, TOKENS)
        token_mask = tokens < n_tokens
        batch = (tokens // seq).to(tl.int64)
        position = (tokens % seq).to(tl.int64)
        cos, sin = load_angles(
            cos_ptr, sin_ptr, batch, position, token_mask, 0, cos_batch, cos_token,
            ROTARY, COS_STEP, 0, 0, 0, False, BLOCK_HALF,
        )  # fmt: skip
        x_tokens = x_ptr + (batch * x_batch + position * x_token)[:, None, None]
        g_tokens = g_ptr + (batch * g_batch + position * g_token)[:, None, None]
        for start in range(0, N_HEADS, HEADS):
            heads = (start + tl.arange(0, HEADS)).to(tl.int64)[None, :, None]
            mask = token_mask[:, None, None] & (heads < N_HEADS)
            rows, g_rows = x_tokens + heads * x_head, g_tokens + heads * g_head
            a, b = load_pairs(rows, mask, x_col, ROTARY, INTERLEAVED, TOKENS, HEADS, BLOCK_HALF)
            rest = _load_rest(rows, mask, x_col, ROTARY, D, BLOCK_REST)
            g_a, g_b = load_pairs(
                g_rows, mask, g_col, ROTARY, INTERLEAVED, TOKENS, HEADS, BLOCK_HALF
            )
            y_rest = _load_rest(g_rows, mask, g_col, ROTARY, D, BLOCK_REST)
            y_a, y_b = g_a * cos + g_b * sin, g_b * cos - g_a * sin
            count: tl.constexpr = D * N_HEADS if WHOLE else D
            rstd = tl.rsqrt(_sum(a * a, b * b, rest * rest, WHOLE) / count + eps)
            rstd = tl.where(mask, rstd, 0.0)  # infinite for rows that are not there, where eps is 0
            a, b, rest = a * rstd, b * rstd, rest * rstd
            if NEEDS_DW:
                n_a, n_b, n_rest = _rounded(a, b, rest, ROUND, dtype)
                dw_a, dw_b, dw_rest = dw_a + y_a * n_a, dw_b + y_b * n_b, dw_rest + y_rest * n_rest
            if NEEDS_DX:
                m_a, m_b, m_rest = y_a * w_a, y_b * w_b, y_rest * w_rest
                mean = _sum(m_a * a, m_b * b, m_rest * rest, WHOLE) / count
                dx_rows = dx_ptr + (batch * dx_batch + position * dx_token)[:, None, None]
                dx_rows += heads * dx_head
                store_pairs(
                    dx_rows, mask, dx_col, rstd * (m_a - a * mean), rstd * (m_b - b * mean),
                    ROTARY, INTERLEAVED, TOKENS, HEADS, BLOCK_HALF,
                )  # fmt: skip
                rest = rstd * (m_rest - rest * mean)
                _store_rest(dx_rows, mask, dx_col, rest, ROTARY, D, BLOCK_REST)
    if NEEDS_DW:
        dw_a, dw_b, dw_rest = tl.sum(dw_a, 0), tl.sum(dw_b, 0), tl.sum(dw_rest, 0)
        if not WHOLE:
            dw_a, dw_b = tl.sum(dw_a, 0)[None, :], tl.sum(dw_b, 0)[None, :]
            dw_rest = tl.sum(dw_rest, 0)[None, :]
        heads = tl.arange(0, w_heads)[None, :, None]
        size: tl.constexpr = D * N_HEADS if WHOLE else D
        rows, mask = partial_ptr + pid.to(tl.int64) * size + heads * D, heads * D < size
        store_pairs(
            rows, mask, 1, dw_a[None, :, :], dw_b[None, :, :], ROTARY, INTERLEAVED, 1, w_heads, BLOCK_HALF,
        )  # fmt: skip
        _store_rest(rows, mask, 1, dw_rest[None, :, :], ROTARY, D, BLOCK_REST)


@triton.jit
def _fwd(
    q_x_ptr, q_out_ptr, q_w_ptr,
    k_x_ptr, k_out_ptr, k_w_ptr,
    cos_ptr, sin_ptr, eps, offset, n_tokens, seq, cos_batch, cos_token,
    q_x_batch, q_x_token, q_x_head, q_x_col,
    q_out_batch, q_out_token, q_out_head, q_out_col,
    k_x_batch, k_x_token, k_x_head, k_x_col,
    k_out_batch, k_out_token, k_out_head, k_out_col,
    Q_HEADS: tl.constexpr, Q_WEIGHT: tl.constexpr, Q_WHOLE: tl.constexpr, Q_TOKENS: tl.constexpr,
    Q_BLOCK: tl.constexpr,
    K_HEADS: tl.constexpr, K_WEIGHT: tl.constexpr, K_WHOLE: tl.constexpr, K_TOKENS: tl.constexpr,
    K_BLOCK: tl.constexpr,
    D: tl.constexpr, ROTARY: tl.constexpr, INTERLEAVED: tl.constexpr, COS_STEP: tl.constexpr,
    ROUND: tl.constexpr, BLOCK_HALF: tl.constexpr, BLOCK_REST: tl.constexpr,
):  # fmt: skip
    """Program (t, 0) owns a tile of tokens of q, program (t, 1) one of k."""
    if tl.program_id(1) == 0:
        _norm_rope(
            q_x_ptr, q_out_ptr, q_w_ptr, cos_ptr, sin_ptr, eps, offset, n_tokens, seq, cos_batch, cos_token,
            q_x_batch, q_x_token, q_x_head, q_x_col, q_out_batch, q_out_token, q_out_head, q_out_col,
            Q_HEADS, D, ROTARY, INTERLEAVED, COS_STEP, Q_WEIGHT, Q_WHOLE, ROUND,
            Q_TOKENS, Q_BLOCK, BLOCK_HALF, BLOCK_REST,
        )  # fmt: skip
    else:
        _norm_rope(
            k_x_ptr, k_out_ptr, k_w_ptr, cos_ptr, sin_ptr, eps, offset, n_tokens, seq, cos_batch, cos_token,
            k_x_batch, k_x_token, k_x_head, k_x_col, k_out_batch, k_out_token, k_out_head, k_out_col,
            K_HEADS, D, ROTARY, INTERLEAVED, COS_STEP, K_WEIGHT, K_WHOLE, ROUND,
            K_TOKENS, K_BLOCK, BLOCK_HALF, BLOCK_REST,
        )  # fmt: skip


@triton.jit
def _bwd(
    q_x_ptr, q_g_ptr, q_dx_ptr, q_w_ptr, q_partial_ptr,
    k_x_ptr, k_g_ptr, k_dx_ptr, k_w_ptr, k_partial_ptr,
    cos_ptr, sin_ptr, eps, offset, n_tokens, seq, cos_batch, cos_token,
    q_x_batch, q_x_token, q_x_head, q_x_col,
    q_g_batch, q_g_token, q_g_head, q_g_col,
    q_dx_batch, q_dx_token, q_dx_head, q_dx_col,
    k_x_batch, k_x_token, k_x_head, k_x_col,
    k_g_batch, k_g_token, k_g_head, k_g_col,
    k_dx_batch, k_dx_token, k_dx_head, k_dx_col,
    Q_HEADS: tl.constexpr, Q_WEIGHT: tl.constexpr, Q_WHOLE: tl.constexpr, Q_DX: tl.constexpr,
    Q_DW: tl.constexpr, Q_TOKENS: tl.constexpr, Q_BLOCK: tl.constexpr,
    K_HEADS: tl.constexpr, K_WEIGHT: tl.constexpr, K_WHOLE: tl.constexpr, K_DX: tl.constexpr,
    K_DW: tl.constexpr, K_TOKENS: tl.constexpr, K_BLOCK: tl.constexpr,
    D: tl.constexpr, ROTARY: tl.constexpr, INTERLEAVED: tl.constexpr, COS_STEP: tl.constexpr,
    ROUND: tl.constexpr, BLOCK_HALF: tl.constexpr, BLOCK_REST: tl.constexpr,
):  # fmt: skip
    """Programs (., 0) own the tokens of q, programs (., 1) those of k."""
    if tl.program_id(1) == 0:
        _norm_rope_bwd(
            q_x_ptr, q_g_ptr, q_dx_ptr, q_w_ptr, q_partial_ptr,
            cos_ptr, sin_ptr, eps, offset, n_tokens, seq, cos_batch, cos_token,
            q_x_batch, q_x_token, q_x_head, q_x_col, q_g_batch, q_g_token, q_g_head, q_g_col,
            q_dx_batch, q_dx_token, q_dx_head, q_dx_col,
            Q_HEADS, D, ROTARY, INTERLEAVED, COS_STEP, Q_WEIGHT, Q_WHOLE, ROUND,
            Q_DX, Q_DW, Q_TOKENS, Q_BLOCK, BLOCK_HALF, BLOCK_REST,
        )  # fmt: skip
    else:
        _norm_rope_bwd(
            k_x_ptr, k_g_ptr, k_dx_ptr, k_w_ptr, k_partial_ptr,
            cos_ptr, sin_ptr, eps, offset, n_tokens, seq, cos_batch, cos_token,
            k_x_batch, k_x_token, k_x_head, k_x_col, k_g_batch, k_g_token, k_g_head, k_g_col,
            k_dx_batch, k_dx_token, k_dx_head, k_dx_col,
            K_HEADS, D, ROTARY, INTERLEAVED, COS_STEP, K_WEIGHT, K_WHOLE, ROUND,
            K_DX, K_DW, K_TOKENS, K_BLOCK, BLOCK_HALF, BLOCK_REST,
        )  # fmt: skip


#: of q or k: its heads, their columns, elements of the weight (None: there is none), and flags of the kernel
Side = tuple[int, int, int | None, tuple[bool, ...]]


@functools.cache
def _compiled_for(
    sides: tuple[Side, ...],
    rotary_dim: int,
    interleaved: bool,
    rounds: bool,
    tile: int,
    flags: tuple[str, ...] = (),
) -> tuple[dict[str, Any], int]:
    """Constants of a kernel for q and k, or one of them, and the fewest tokens of a program."""
    configs, constants = [], dict[str, Any]()
    for i, prefix in enumerate("QK"):
        # of one tensor, the second half of the kernel is never run
        heads, columns, n_weight, values = sides[min(i, len(sides) - 1)]
        whole = (
            heads > 1 and n_weight == heads * columns
        )  # all heads of a token are normed together
        config = Config.of((heads,), columns, rotary_dim, tile, (whole,))
        configs.append(config)
        constants |= {
            f"{prefix}_HEADS": heads,
            f"{prefix}_WEIGHT": n_weight is not None,
            f"{prefix}_WHOLE": whole,
            **{f"{prefix}_{name}": value for name, value in zip(flags, values, strict=True)},
            f"{prefix}_TOKENS": config.tokens,
            f"{prefix}_BLOCK": config.heads[0],
        }
    constants |= {
        "D": sides[0][1],
        "ROTARY": rotary_dim,
        "INTERLEAVED": interleaved,
        "ROUND": rounds,
        "BLOCK_HALF": configs[0].block_half,
        "BLOCK_REST": configs[0].block_rest,
        "num_warps": max(config.warps for config in configs),
    }
    return constants, min(config.tokens for config in configs)


def _form(options: QKNormRopeOptions) -> tuple[int, bool, bool]:
    return options.rotary_dim, options.interleaved, options.casting_mode == "llama"


def _side(x: Tensor, weight: Tensor | None, heads_dim: int, flags: tuple[bool, ...] = ()) -> Side:
    shape = x.shape
    return shape[heads_dim], shape[3], None if weight is None else weight.numel(), flags


def _launch(
    kernel: Any,
    programs: int,
    sides: Sequence[Sequence[Tensor | None]],
    with_heads: int,
    angles: tuple[Tensor, Tensor],
    options: QKNormRopeOptions,
    constants: dict[str, Any],
) -> None:
    """`sides`, of q and of k or one of them: `with_heads` tensors with heads, and the others from the weight on."""
    cos, sin = angles
    at = options.unsqueeze_dim
    strides: tuple[int, ...] = ()
    for side in (sides[0], sides[-1]):
        for t in side[:with_heads]:
            strides += (0,) * 4 if t is None else strides_of(t, at)
    batch, seq = (sides[0][0].shape[i] for i in (0, 3 - at))  # type: ignore[union-attr]
    wide = options.interleaved and cos.shape[2] >= options.rotary_dim
    launch(
        kernel,
        (programs, len(sides)),
        *sides[0],
        *sides[-1],
        cos,
        sin,
        options.eps,
        options.offset,
        batch * seq,
        seq,
        0 if cos.shape[0] == 1 else cos.stride(0),
        cos.stride(1),
        *strides,
        **constants,
        COS_STEP=cos.stride(2) * (2 if wide else 1),
    )


def forward(
    q: Tensor,
    k: Tensor | None,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    *,
    options: QKNormRopeOptions,
    needs: Needs,
) -> tuple[Grads, Saved]:
    weights = [None if w is None else w.contiguous() for w in (q_weight, k_weight)]
    outs = [x if x is None else torch.empty_like(x) for x in (q, k)]
    at = options.unsqueeze_dim
    n_tokens = q.shape[0] * q.shape[3 - at]
    if n_tokens:
        kinds: tuple[Side, ...] = (_side(q, weights[0], at),)
        if k is not None:
            kinds += (_side(k, weights[1], at),)
        constants, tokens = _compiled_for(kinds, *_form(options), FORWARD_TILE)
        sides = [(q, outs[0], weights[0]), (k, outs[1], weights[1])][: len(kinds)]
        _launch(_fwd, cdiv(n_tokens, tokens), sides, 2, (cos, sin), options, constants)
    return (outs[0], outs[1]), (q, k, *weights, cos, sin)


def backward(grads: Grads, saved: Saved, *, options: QKNormRopeOptions, needs: Needs) -> Grads:
    *tensors, cos, sin = saved
    angles: Any = (cos, sin)
    at: list[int] = [
        i for i, grad in enumerate(grads) if grad is not None and (needs[i] or needs[2 + i])
    ]
    found: list[Tensor | None] = [None] * 6
    if not at:
        return found
    given: list[Any] = [(tensors[i], tensors[2 + i]) for i in at]
    heads_dim, x = options.unsqueeze_dim, given[0][0]
    kinds = tuple(
        [_side(*xw, heads_dim, (needs[i], needs[2 + i])) for i, xw in zip(at, given, strict=True)]
    )
    constants, tokens = _compiled_for(kinds, *_form(options), BACKWARD_TILE, ("DX", "DW"))
    tiles = cdiv(x.shape[0] * x.shape[3 - heads_dim], tokens)
    programs = max(1, min(tiles, PROGRAMS * facts_of(x.device).processors))
    sizes = [given[i][1].numel() if needs[2 + at[i]] else 0 for i in range(len(at))]
    partial = x.new_empty(programs * sum(sizes), dtype=torch.float32)
    parts = partial.split([programs * size for size in sizes])
    sides = []
    for i, (x, w), part in zip(at, given, parts, strict=True):
        found[i] = torch.empty_like(x) if needs[i] else None
        sides.append((x, grads[i], found[i], w, part))
    _launch(_bwd, programs, sides, 3, angles, options, constants)
    summed = [i for i, size in enumerate(sizes) if size]
    if len(summed) == 2 and sizes[0] == sizes[1]:
        both = column_sums(partial.view(2, programs, -1), [w.dtype for _, w in given])
    else:
        both = [column_sums(parts[i].view(1, programs, -1), [given[i][1].dtype])[0] for i in summed]
    for i, total in zip(summed, both, strict=True):
        found[2 + at[i]] = total.view(given[i][1].shape)
    return found
