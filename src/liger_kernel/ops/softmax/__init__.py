"""Softmax over the last dimension, of any length; the rescaled sum is that of Milakov & Gimelshein 2018
(https://arxiv.org/abs/1805.02867)."""

from __future__ import annotations

import functools

from torch import Tensor

from liger_kernel._core.autograd import Op
from liger_kernel._core.checks import check_rows
from liger_kernel._core.dtensor import on_row_shards
from liger_kernel._core.lazy import compat_names
from liger_kernel.backends.dispatch import Dispatch
from liger_kernel.ops import OPS
from liger_kernel.ops.softmax import reference
from liger_kernel.ops.softmax.contract import SoftmaxOptions


class _Softmax(Op):
    pass


_dispatch = Dispatch(
    "softmax",
    _Softmax,
    reference.softmax,
    shards=functools.partial(on_row_shards, n_rows_tensors=1),
    small=2**22,  # as for the norms
    eager=lambda options, x: reference.softmax(x),
)


def softmax(x: Tensor) -> Tensor:
    """Softmax over the last dimension: `exp(x - max) / sum(exp(x - max))`.

    Args:
        x: (..., V), any floating dtype, any strides, any V. A DTensor is computed shard by shard, whole rows at a time.

    Returns: (..., V) in the dtype of x, computed in fp32 and rounded once. A row of nothing but -inf, or with +inf or
        NaN in it, is NaN, as in PyTorch.
    Raises: TypeError for integers; ValueError for a tensor without dimensions.
    """
    check_rows(x)
    return _dispatch(SoftmaxOptions(), x)


__getattr__ = compat_names(__name__, OPS["softmax"])
