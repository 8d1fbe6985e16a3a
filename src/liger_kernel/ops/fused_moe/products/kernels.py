"""Grouped matrix products over rows sorted by expert. A tile of rows is of one expert; one table serves them all."""

from __future__ import annotations

import triton
import triton.language as tl

from liger_kernel.backends.kernels import dot
from liger_kernel.ops.fused_moe.kernels import activation_of, places


@triton.jit
def _inside(at, n, ALIGNED: tl.constexpr):
    """`at` below n, and 0 beyond: what lies outside is read from inside, and not stored.

    ALIGNED: n is a multiple of 8. Vectors lie inside or outside as a whole then, which the compiler does not see; its
    loads of single elements ran at a tenth of the speed.
    """
    inside = tl.where(at < n, at, 0)
    if ALIGNED:
        inside = tl.max_contiguous(tl.multiple_of(inside, 8), 8)
    return inside


@triton.jit
def tile_table(
    starts_ptr,
    tiles_ptr,
    n_experts,
    n_tiles,
    ROWS: tl.constexpr,
    EXPERTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """(expert, first row) of every tile of ROWS rows, in order; expert -1 for those that are left.

    A program owns the tiles of an expert, the last one those that are left.
    """
    own = tl.program_id(0)
    expert = tl.arange(0, EXPERTS)
    start = tl.load(starts_ptr + expert, mask=expert < n_experts, other=0)
    end = tl.load(starts_ptr + expert + 1, mask=expert < n_experts, other=0)
    count = tl.cdiv(end - start, ROWS)
    first = tl.sum(tl.where(expert < own, count, 0))
    last = first + tl.sum(tl.where(expert == own, count, 0))
    row = tl.load(starts_ptr + own)
    if own == n_experts:
        last = n_tiles
        own = -1
    for tile in range(first, last, BLOCK):
        at = tile + tl.arange(0, BLOCK)
        tl.store(tiles_ptr + 2 * at, tl.zeros((BLOCK,), tl.int32) + own, mask=at < last)
        tl.store(tiles_ptr + 2 * at + 1, row + (at - first) * ROWS, mask=at < last)


@triton.jit
def _halves(acc, NEIGHBOURS: tl.constexpr):
    """The columns of both halves; with NEIGHBOURS those at even and at odd places."""
    ROWS: tl.constexpr = acc.shape[0]
    HALF: tl.constexpr = acc.shape[1] // 2
    if NEIGHBOURS:
        first, second = tl.split(tl.reshape(acc, (ROWS, HALF, 2)))
    else:
        first, second = tl.split(tl.permute(tl.reshape(acc, (ROWS, 2, HALF)), (0, 2, 1)))
    return first, second


@triton.jit
def _end_activated(
    acc,
    hidden_ptr,
    act_ptr,
    rows,
    live,
    first_col,
    features,
    limit,
    alpha,
    up_shift,
    KEEP: tl.constexpr,
    ACTIVATION: tl.constexpr,
    GATED: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    LIMITED: tl.constexpr,
):
    """Store the output of the first product, if backward needs it, and its activation, of which the first column is
    `first_col`."""
    hidden = acc.to(act_ptr.dtype.element_ty)
    gate = hidden
    up = hidden
    if GATED:
        gate, up = _halves(hidden, INTERLEAVED)
    cols = first_col + tl.arange(0, gate.shape[1])[None, :]
    rows = rows[:, None]
    mask = live[:, None] & (cols < features)
    if KEEP:
        if INTERLEAVED:
            both = 2 * first_col + tl.arange(0, acc.shape[1])[None, :]
            at = hidden_ptr + rows * (2 * features) + both
            tl.store(at, hidden, mask=live[:, None] & (both < 2 * features))
        else:
            gate_at, up_at = places(rows, cols, features, GATED, False)
            tl.store(hidden_ptr + gate_at, gate, mask=mask)
            if GATED:
                tl.store(hidden_ptr + up_at, up, mask=mask)
    value, _, factor, _, _ = activation_of(
        gate, up, limit, alpha, up_shift, ACTIVATION, GATED, LIMITED
    )
    tl.store(act_ptr + rows * features + cols, (value * factor).to(hidden.dtype), mask=mask)


@triton.jit
def _weight_tile(
    weight_desc, expert, first_col, at, n_cols, n_inner, TURNED: tl.constexpr
):  # (INNER, COLS)
    if TURNED:
        weight = weight_desc.load([expert * n_inner + at, first_col])
    else:
        weight = tl.trans(weight_desc.load([expert * n_cols + first_col, at]))
    return weight


@triton.jit
def _sums_by_tiles(
    a_ptrs,
    a_desc,
    weight_desc,
    first_row,
    expert,
    first_col,
    n_cols,
    n_inner,
    features,
    A_DESC: tl.constexpr,
    TURNED: tl.constexpr,
    PAIRED: tl.constexpr,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    INNER: tl.constexpr,
):
    """sum_m a[p, m] weight[e, n, m], of tiles that the copy engine reads. PAIRED: of COLS / 2 columns from `first_col`,
    and of as many `features` further."""
    WIDE: tl.constexpr = COLS // (1 + PAIRED)
    acc = tl.zeros((ROWS, WIDE), tl.float32)
    ups = acc
    for at in range(0, n_inner, INNER):
        if A_DESC:
            a = a_desc.load([first_row, at])
        else:
            a = tl.load(a_ptrs)
            a_ptrs += INNER
        weight = _weight_tile(weight_desc, expert, first_col, at, n_cols, n_inner, TURNED)
        acc = dot(a, weight, acc, PRECISION)
        if PAIRED:
            second = first_col + features
            weight = _weight_tile(weight_desc, expert, second, at, n_cols, n_inner, TURNED)
            ups = dot(a, weight, ups, PRECISION)
    if PAIRED:
        acc = tl.reshape(tl.permute(tl.join(acc, ups), (0, 2, 1)), (ROWS, COLS))
    return acc


@triton.jit
def _product_tile(
    a_ptr,
    a_desc,
    weight_ptr,
    weight_desc,
    bias_ptr,
    low_ptr,
    low_b_ptr,
    out_ptr,
    act_ptr,
    tokens_ptr,
    expert,
    first_row,
    end,
    col_tile,
    n_cols,
    n_inner,
    expert_stride,
    col_stride,
    inner_stride,
    rank,
    low_b_expert_stride,
    low_b_col_stride,
    low_b_rank_stride,
    scale,
    features,
    limit,
    alpha,
    up_shift,
    GATHERED: tl.constexpr,
    A_DESC: tl.constexpr,
    WEIGHT_DESC: tl.constexpr,
    TURNED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    RANK: tl.constexpr,
    KEEP: tl.constexpr,
    ACTIVATION: tl.constexpr,
    GATED: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    LIMITED: tl.constexpr,
    EVEN: tl.constexpr,
    ALIGNED: tl.constexpr,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    INNER: tl.constexpr,
):
    PAIRED: tl.constexpr = ACTIVATION != "none" and GATED and not INTERLEAVED
    rows = first_row + tl.arange(0, ROWS)
    live = rows < end
    own = tl.arange(0, COLS)
    cols = col_tile * COLS + own
    first_col = col_tile * COLS
    if PAIRED:  # gates, and the ups that go with them
        first_col = col_tile * (COLS // 2)
        one = first_col + own % (COLS // 2)
        inside = _inside(one, features, ALIGNED) + own // (COLS // 2) * features
        if ALIGNED:
            inside = tl.max_contiguous(tl.multiple_of(inside, 8), 8)
        inside = inside.to(tl.int64)
    else:
        inside = _inside(cols, n_cols, ALIGNED).to(tl.int64)
    source = rows
    if GATHERED:
        source = tl.load(tokens_ptr + rows, mask=live, other=0).to(tl.int64)
    source = tl.where(live, source, 0)
    inner = tl.arange(0, INNER)
    a_ptrs = a_ptr + source[:, None] * n_inner + inner[None, :]
    if WEIGHT_DESC:  # EVEN
        acc = _sums_by_tiles(
            a_ptrs,
            a_desc,
            weight_desc,
            first_row.to(tl.int32),
            expert.to(tl.int32),
            first_col,
            n_cols,
            n_inner,
            features,
            A_DESC,
            TURNED,
            PAIRED,
            PRECISION,
            ROWS,
            COLS,
            INNER,
        )
    else:
        weight_ptrs = weight_ptr + expert * expert_stride
        weight_ptrs += inside[None, :] * col_stride + inner[:, None].to(tl.int64) * inner_stride
        acc = tl.zeros((ROWS, COLS), tl.float32)
        for at in range(0, n_inner, INNER):
            if EVEN:
                a = tl.load(a_ptrs)
                weight = tl.load(weight_ptrs)
            else:
                left = n_inner - at
                a = tl.load(a_ptrs, mask=inner[None, :] < left, other=0.0)
                weight = tl.load(weight_ptrs, mask=inner[:, None] < left, other=0.0)
            acc = dot(a, weight, acc, PRECISION)
            a_ptrs += INNER
            weight_ptrs += INNER * inner_stride
    acc *= scale
    if RANK:
        low_ptr += tl.where(live, rows, 0)[:, None] * rank
        low_b_ptr += expert * low_b_expert_stride + inside[None, :] * low_b_col_stride
        for at in range(0, rank, RANK):
            r = at + tl.arange(0, RANK)
            low = tl.load(low_ptr + r[None, :], mask=r[None, :] < rank, other=0.0)
            low_b = low_b_ptr + r[:, None].to(tl.int64) * low_b_rank_stride
            low_b = tl.load(low_b, mask=r[:, None] < rank, other=0.0)
            acc = dot(low, low_b, acc, PRECISION)
    if HAS_BIAS:
        acc += tl.load(bias_ptr + expert * n_cols + inside).to(tl.float32)[None, :]
    if ACTIVATION != "none":
        _end_activated(
            acc,
            out_ptr,
            act_ptr,
            rows,
            live,
            col_tile * (COLS // (1 + GATED)),
            features,
            limit,
            alpha,
            up_shift,
            KEEP,
            ACTIVATION,
            GATED,
            INTERLEAVED,
            LIMITED,
        )
    else:
        out_ptrs = out_ptr + rows[:, None] * n_cols + cols[None, :]
        mask = live[:, None] & (cols < n_cols)[None, :]
        tl.store(out_ptrs, acc.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["n_tiles"])
def grouped_product(
    a_ptr,
    a_desc,
    a_half_desc,
    weight_ptr,
    weight_desc,
    bias_ptr,
    low_ptr,
    low_b_ptr,
    out_ptr,
    act_ptr,
    tokens_ptr,
    starts_ptr,
    tiles_ptr,
    n_tiles,
    n_cols,
    n_inner,
    expert_stride,
    col_stride,
    inner_stride,
    rank,
    low_b_expert_stride,
    low_b_col_stride,
    low_b_rank_stride,
    scale,
    features,
    limit,
    alpha,
    up_shift,
    GATHERED: tl.constexpr,
    A_DESC: tl.constexpr,
    WEIGHT_DESC: tl.constexpr,
    TURNED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    RANK: tl.constexpr,
    PARTS: tl.constexpr,
    HALVES: tl.constexpr,
    KEEP: tl.constexpr,
    ACTIVATION: tl.constexpr,
    GATED: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    LIMITED: tl.constexpr,
    EVEN: tl.constexpr,
    ALIGNED: tl.constexpr,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    INNER: tl.constexpr,
    GROUP: tl.constexpr,
):
    """out[p, n] = scale sum_m a[p, m] weight[e, n, m] + sum_r low[p, r] low_b[e, n, r] + bias[e, n].

    With GATHERED a has the rows of tokens. A program owns ROWS rows of one expert and COLS columns. EVEN: n_inner is a
    multiple of INNER. RANK: a step over that of low; 0: there is none. PARTS: of a tile of the table, each of ROWS
    rows; n_tiles counts them. HALVES: half a tile is computed where half of the rows are there. ACTIVATION: "none"
    stores the sums, others end as `_end_activated` does. WEIGHT_DESC: the copy engine reads the weight, by
    `weight_desc` of (E N, M), or TURNED of (E M, N), and A_DESC: sorted rows, by `a_desc`, or `a_half_desc` for half a
    tile.
    """
    pid = tl.program_id(0)
    col_tiles = tl.cdiv(n_cols, COLS)
    first = pid // (GROUP * col_tiles) * GROUP
    size = tl.minimum(n_tiles - first, GROUP)
    within = pid % (GROUP * col_tiles)
    tile = first + within % size
    expert = tl.load(tiles_ptr + 2 * (tile // PARTS)).to(tl.int64)
    if expert < 0:
        return
    first_row = tl.load(tiles_ptr + 2 * (tile // PARTS) + 1).to(tl.int64) + tile % PARTS * ROWS
    end = tl.load(starts_ptr + expert + 1)
    if first_row >= end:
        return
    col_tile = within // size
    few = 0
    if HALVES:
        few = (end - first_row <= ROWS // 2).to(tl.int32)
    for half in tl.static_range(1 + HALVES):
        if few == half:
            _product_tile(
                a_ptr,
                a_half_desc if half else a_desc,
                weight_ptr,
                weight_desc,
                bias_ptr,
                low_ptr,
                low_b_ptr,
                out_ptr,
                act_ptr,
                tokens_ptr,
                expert,
                first_row,
                end,
                col_tile,
                n_cols,
                n_inner,
                expert_stride,
                col_stride,
                inner_stride,
                rank,
                low_b_expert_stride,
                low_b_col_stride,
                low_b_rank_stride,
                scale,
                features,
                limit,
                alpha,
                up_shift,
                GATHERED,
                A_DESC,
                WEIGHT_DESC,
                TURNED,
                HAS_BIAS,
                RANK,
                KEEP,
                ACTIVATION,
                GATED,
                INTERLEAVED,
                LIMITED,
                EVEN,
                ALIGNED,
                PRECISION,
                ROWS // (1 + half),
                COLS,
                INNER,
            )


@triton.jit
def weight_gradient(
    a_ptr,
    b_ptr,
    out_ptr,
    tokens_ptr,
    starts_ptr,
    a_cols,
    b_cols,
    GATHERED_A: tl.constexpr,
    GATHERED_B: tl.constexpr,
    ALIGNED: tl.constexpr,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    INNER: tl.constexpr,
    GROUP: tl.constexpr,
):
    """out[e] = sum over the rows p of expert e of a[p]^T b[p]. A program owns (ROWS, COLS) of one expert's; GROUP
    tiles of rows, and columns tile by tile, are worked at a time."""
    pid = tl.program_id(0)
    col_tiles = tl.cdiv(b_cols, COLS)
    row_tiles = tl.cdiv(a_cols, ROWS)
    expert = (pid // (row_tiles * col_tiles)).to(tl.int64)
    within = pid % (row_tiles * col_tiles)
    first = within // (GROUP * col_tiles) * GROUP
    size = tl.minimum(row_tiles - first, GROUP)
    within = within % (GROUP * col_tiles)
    rows = (first + within % size) * ROWS + tl.arange(0, ROWS)
    cols = within // size * COLS + tl.arange(0, COLS)
    a_at = _inside(rows, a_cols, ALIGNED)[None, :]
    b_at = _inside(cols, b_cols, ALIGNED)[None, :]
    start = tl.load(starts_ptr + expert)
    end = tl.load(starts_ptr + expert + 1)
    acc = tl.zeros((ROWS, COLS), tl.float32)
    row = start + tl.arange(0, INNER)
    token = row
    if GATHERED_A or GATHERED_B:
        token = tl.load(tokens_ptr + row, mask=row < end, other=0)
    for _ in range(start, end, INNER):
        live = row < end
        a_row = (token if GATHERED_A else row).to(tl.int64)
        b_row = (token if GATHERED_B else row).to(tl.int64)
        a_ptrs = a_ptr + a_row[:, None] * a_cols + a_at
        b_ptrs = b_ptr + b_row[:, None] * b_cols + b_at
        row += INNER
        token = row
        # a step ahead: the compiler has as many steps of a and b under way as it is told
        if GATHERED_A or GATHERED_B:
            token = tl.load(tokens_ptr + row, mask=row < end, other=0)
        a = tl.load(a_ptrs, mask=live[:, None], other=0.0)
        b = tl.load(b_ptrs, mask=live[:, None], other=0.0)
        acc = dot(tl.trans(a), b, acc, PRECISION)
    out_ptrs = out_ptr + (expert * a_cols + rows[:, None]) * b_cols + cols[None, :]
    mask = (rows < a_cols)[:, None] & (cols < b_cols)[None, :]
    tl.store(out_ptrs, acc.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def bias_gradient(
    a_ptr,
    weights_ptr,
    out_ptr,
    slots_ptr,
    tokens_ptr,
    starts_ptr,
    n_cols,
    GATHERED: tl.constexpr,
    WEIGHTED: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """out[e] = sum over the rows p of expert e of weights[slot of p] a[p]. A program owns COLS columns of one sum."""
    col_tiles = tl.cdiv(n_cols, COLS)
    expert = (tl.program_id(0) // col_tiles).to(tl.int64)
    cols = tl.program_id(0) % col_tiles * COLS + tl.arange(0, COLS)
    start = tl.load(starts_ptr + expert)
    end = tl.load(starts_ptr + expert + 1)
    total = tl.zeros((ROWS, COLS), tl.float32)
    for at in range(start, end, ROWS):
        row = at + tl.arange(0, ROWS).to(tl.int64)
        live = row < end
        source = row
        if GATHERED:
            source = tl.load(tokens_ptr + row, mask=live, other=0).to(tl.int64)
        mask = live[:, None] & (cols < n_cols)[None, :]
        a = tl.load(a_ptr + source[:, None] * n_cols + cols[None, :], mask=mask, other=0.0)
        a = a.to(tl.float32)
        if WEIGHTED:
            slot = tl.load(slots_ptr + row, mask=live, other=0)
            a *= tl.load(weights_ptr + slot, mask=live, other=0.0).to(tl.float32)[:, None]
        total += a
    tl.store(out_ptr + expert * n_cols + cols, tl.sum(total, 0), mask=cols < n_cols)
