"""Kernels that scale gradients: they move 2 n elements, or nothing where the factor is 1."""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from liger_kernel._core.shapes import cdiv
from liger_kernel.backends import facts_of
from liger_kernel.backends.kernels import launch

BLOCK = 4096  # elements a program loads at a time
PROGRAMS_PER_PROCESSOR = 8  # enough to fill it; each goes on to further blocks


@triton.jit
def _scale_one(x_ptr, n, factor, BLOCK: tl.constexpr):
    lanes = tl.arange(0, BLOCK)
    for tile in range(tl.program_id(0), tl.cdiv(n, BLOCK), tl.num_programs(0)):
        at = tl.cast(tile, tl.int64) * BLOCK + lanes
        x = tl.load(x_ptr + at, mask=at < n, other=0.0).to(tl.float32) * factor
        tl.store(x_ptr + at, x.to(x_ptr.dtype.element_ty), mask=at < n)


@triton.jit
def _scale(
    a_ptr,
    b_ptr,
    c_ptr,
    factor_ptr,
    a_size,
    b_size,
    c_size,
    HAS_B: tl.constexpr,
    HAS_C: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """a, b, c *= factor, and nothing at all where factor is 1. A program owns every n-th block of each buffer."""
    factor = tl.load(factor_ptr).to(tl.float32)
    if factor != 1.0:
        _scale_one(a_ptr, a_size, factor, BLOCK)
        if HAS_B:
            _scale_one(b_ptr, b_size, factor, BLOCK)
        if HAS_C:
            _scale_one(c_ptr, c_size, factor, BLOCK)


def scale_(buffers: Sequence[Tensor], factor: Tensor) -> None:
    largest = max(buffer.numel() for buffer in buffers)
    most = PROGRAMS_PER_PROCESSOR * facts_of(factor.device).processors
    programs = min(cdiv(largest, BLOCK), most)
    a, b, c = (*buffers, None, None)[:3]
    launch(
        _scale,
        (programs,),
        a,
        b,
        c,
        factor,
        a.numel(),
        0 if b is None else b.numel(),
        0 if c is None else c.numel(),
        HAS_B=b is not None,
        HAS_C=c is not None,
        BLOCK=BLOCK,
        num_warps=8,
    )
