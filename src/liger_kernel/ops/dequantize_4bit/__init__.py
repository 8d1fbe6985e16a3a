"""Weights of 4 bits in blocks (NF4 and FP4 of QLoRA, Dettmers et al. 2023, https://arxiv.org/abs/2305.14314)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from liger_kernel._core.autograd import Op
from liger_kernel._core.checks import check_floating, check_same_device
from liger_kernel._core.shapes import cdiv
from liger_kernel.backends.dispatch import Dispatch, no_shards
from liger_kernel.ops.dequantize_4bit import reference
from liger_kernel.ops.dequantize_4bit.contract import Dequantize4bitOptions


class _Dequantize4bit(Op):
    pass


_dispatch = Dispatch(
    "dequantize_4bit",
    _Dequantize4bit,
    reference.dequantize_4bit,
    shards=no_shards("dequantize_4bit", "pass the shards, .to_local()"),
)


def dequantize_4bit(
    packed: Tensor,
    code: Tensor,
    absmax: Tensor,
    absmax_code: Tensor | None = None,
    absmax_scale: Tensor | None = None,
    absmax_offset: Tensor | None = None,
    *,
    shape: Sequence[int],
    dtype: torch.dtype | None = None,
    blocksize: int = 64,
    absmax_blocksize: int = 256,
) -> Tensor:
    """`code[i] * absmax[block of i]`, in the layout of bitsandbytes; no gradient.

    Args:
        packed: two indices of 4 bits in each byte, the first in the upper bits; any shape and dtype, contiguous or not.
        code: (16,), the numbers that the indices stand for. absmax: one number for each block; or, quantised once more,
            uint8 indices into `absmax_code` (256,), with one `absmax_scale` for `absmax_blocksize` of them, and a 0-d
            `absmax_offset` that is added.
        shape: of the result. dtype: of the result; None: that of code. blocksize: a power of 2.

    Returns: a new tensor, computed in fp32 and rounded once.
    Raises: ValueError for sizes that do not fit, TypeError for other dtypes.
    """
    n = math.prod(shape)
    packed = packed if packed.dtype == torch.uint8 else packed.contiguous().view(torch.uint8)
    tensors = (packed, code, absmax, absmax_code, absmax_scale, absmax_offset)
    check_floating(code=code, absmax_code=absmax_code, absmax_scale=absmax_scale)
    check_same_device(packed=packed, code=code, absmax=absmax, absmax_code=absmax_code)
    if (absmax_code is None) != absmax.is_floating_point() or (absmax_code is None) != (
        absmax_scale is None
    ):
        raise TypeError(
            f"absmax is {absmax.dtype}; pass floats, or uint8 with absmax_code and absmax_scale."
        )
    if blocksize < 2 or blocksize & (blocksize - 1):
        raise ValueError(f"blocksize={blocksize} is no power of 2; bitsandbytes has 64 mostly.")
    wanted = (cdiv(n, 2), 16, cdiv(n, blocksize))
    found = (packed.numel(), code.numel(), absmax.numel())
    n_scales = cdiv(wanted[2], absmax_blocksize)
    if found != wanted or (absmax_scale is not None and absmax_scale.numel() != n_scales):
        scales = "" if absmax_scale is None else f" and {absmax_scale.numel()} scales"
        raise ValueError(
            f"packed, code and absmax have {found} elements{scales}, but {tuple(shape)} in blocks of {blocksize} "
            f"takes {wanted}{scales and f' and {n_scales}'}."
        )
    options = Dequantize4bitOptions(tuple(shape), dtype or code.dtype, blocksize, absmax_blocksize)
    out: Tensor = _dispatch(options, *tensors)
    return out
