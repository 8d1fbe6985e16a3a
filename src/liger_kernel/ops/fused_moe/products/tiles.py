"""What all grouped products share: the table of tiles, and a step of their sums."""

from __future__ import annotations

import triton
import triton.language as tl

from liger_kernel.backends.triton import INTERPRET

# NumPy knows no bf16, in which the interpreter would multiply
_WIDEN = tl.constexpr(INTERPRET)


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr):
    if _WIDEN:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def clipped(at, n, ALIGNED: tl.constexpr):
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
