"""int8 activations times ternary weights of 2 bits, as in BitNet b1.58 (Ma et al. 2024, https://arxiv.org/abs/2402.17764)."""

from __future__ import annotations

import torch
from torch import Tensor

from liger_kernel._core.autograd import Op
from liger_kernel._core.checks import check_same_device
from liger_kernel.backends.dispatch import Dispatch, no_shards
from liger_kernel.ops.mm_int8int2 import reference
from liger_kernel.ops.mm_int8int2.contract import Int8Int2Options


class _Int8Int2(Op):
    pass


_dispatch = Dispatch(
    "mm_int8int2",
    _Int8Int2,
    reference.mm_int8int2,
    shards=no_shards("mm_int8int2", "pass the shards, .to_local()"),
)


def mm_int8int2(a: Tensor, b: Tensor) -> Tensor:
    """`a @ unpack_weights(b)`, exact.

    Args: a: (M, K) int8, any strides. b: (K / 4, N) uint8, as `pack_weights` makes it.

    Returns: (M, N) int32.
    Raises: TypeError for other dtypes, ValueError for shapes that do not fit.
    """
    if a.dtype != torch.int8 or b.dtype != torch.uint8:
        raise TypeError(f"a is {a.dtype} and b {b.dtype}; pass int8, and uint8 from pack_weights.")
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != 4 * b.shape[0]:
        raise ValueError(
            f"a {tuple(a.shape)} and b {tuple(b.shape)} do not fit; pass (M, K) and (K / 4, N)."
        )
    check_same_device(a=a, b=b)
    found: Tensor = _dispatch(Int8Int2Options(), a, b)
    return found


def pack_weights(intweights: Tensor, bits: int = 2) -> Tensor:
    """(K, ...) integers of -1, 0 and 1 as (K / 4, ...) uint8: four in a byte, from four quarters of the rows.

    The lowest two bits hold the first quarter, plus 1. ValueError for other numbers, which the host looks for, for rows
    that 4 does not divide, and for bits other than 2.
    """
    _check_bits(bits)
    if intweights.ndim == 0 or intweights.shape[0] % 4:
        raise ValueError(
            f"intweights has shape {tuple(intweights.shape)}; pad its rows to a multiple of 4."
        )
    if intweights.numel() and (intweights.abs() > 1).any():
        lowest, highest = intweights.aminmax()
        raise ValueError(
            f"intweights has numbers from {lowest} to {highest}; 2 bits hold -1, 0 and 1."
        )
    first, *others = (intweights + 1).to(torch.uint8).chunk(4)
    for i, quarter in enumerate(others, 1):
        first = first | quarter << 2 * i
    return first


def unpack_weights(packed: Tensor, bits: int = 2) -> Tensor:
    """The int32 integers that `pack_weights` was given."""
    _check_bits(bits)
    return reference.unpacked(packed).to(torch.int32)


def _check_bits(bits: int) -> None:
    if bits != 2:
        raise ValueError(f"bits={bits}, but weights are packed in 2 bits each.")
