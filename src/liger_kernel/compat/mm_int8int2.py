"""`liger_kernel.ops.experimental.mm_int8int2`"""

from __future__ import annotations

from liger_kernel.ops.mm_int8int2 import mm_int8int2 as _mm
from liger_kernel.ops.mm_int8int2 import pack_weights as pack_weights
from liger_kernel.ops.mm_int8int2 import unpack_weights as unpack_weights


def matmul(a, b):
    """(M, N) int32 of a (M, K) int8 and b (K / 4, N) uint8."""
    return _mm(a, b)
