"""Triton functions that other projects call from kernels, or launch, themselves."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def silu(x):
    """x * sigmoid(x); of float32, for the usual accuracy."""
    return x * tl.sigmoid(x)


@triton.jit
def element_mul_kernel(
    X_ptr, X_stride, grad_output_ptr, n_cols, BLOCK_SIZE: tl.constexpr, X_col_stride=1
):
    """Multiplies row `program_id(0)` of X, in place, by the number at `grad_output_ptr`. Strides in elements."""
    X_ptr += tl.program_id(0).to(tl.int64) * X_stride
    factor = tl.load(grad_output_ptr).to(tl.float32)
    for start in range(0, n_cols, BLOCK_SIZE):
        columns = start + tl.arange(0, BLOCK_SIZE)
        places = X_ptr + columns.to(tl.int64) * X_col_stride
        x = tl.load(places, mask=columns < n_cols).to(tl.float32)
        tl.store(places, (x * factor).to(X_ptr.dtype.element_ty), mask=columns < n_cols)
