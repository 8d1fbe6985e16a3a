"""Small things that the incumbent's op modules also have. What needs Triton is made on first use."""

from __future__ import annotations

from typing import Any, Literal

REDUCTION_LITERAL = Literal["none", "sum", "mean", "batchmean"]


def get_num_warps(BLOCK_SIZE: int) -> int:
    """Warps for a row in one block."""
    return (
        32 if BLOCK_SIZE >= 32768 else 16 if BLOCK_SIZE >= 8192 else 8 if BLOCK_SIZE >= 2048 else 4
    )


def get_bucket_m(M: int, threshold: int = 4096, bucket_size: int = 128) -> int:
    """A number for so many rows, the same for similar ones: a key for measured launch configurations."""
    few = bucket_size * 2
    return M // 32 if few > M else 8 + min(M, threshold) // bucket_size


def __getattr__(name: str) -> Any:
    if name == "LOG2_E":
        import triton.language as tl

        return tl.constexpr(1.4426950408889634)
    if name == "TensorDescriptor":  # of Triton 3.4 and later
        from triton.tools.tensor_descriptor import TensorDescriptor

        return TensorDescriptor
    if name == "silu":
        from liger_kernel.compat.ops import kernels

        return kernels.silu
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
