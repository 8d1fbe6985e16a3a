"""Sparsemax, the point of the simplex that is nearest to x (Martins & Astudillo 2016,
https://arxiv.org/abs/1602.02068)."""

from __future__ import annotations

import functools

from torch import Tensor

from liger_kernel._core.autograd import Op
from liger_kernel._core.checks import check_rows
from liger_kernel._core.dtensor import on_row_shards
from liger_kernel._core.lazy import compat_names
from liger_kernel.backends.dispatch import Dispatch
from liger_kernel.ops import OPS
from liger_kernel.ops.sparsemax import reference
from liger_kernel.ops.sparsemax.contract import SparsemaxOptions


class _Sparsemax(Op):
    pass


_dispatch = Dispatch(
    "sparsemax",
    _Sparsemax,
    reference.sparsemax,
    shards=functools.partial(on_row_shards, n_rows_tensors=1),
)


def sparsemax(x: Tensor, dim: int = -1) -> Tensor:
    """Sparsemax: `max(x - tau, 0)`, with the tau that makes it sum to 1 along `dim`.

    Args:
        x: any shape, floating dtype and strides. A DTensor is computed shard by shard, whole rows at a time.
        dim: of any length. A dimension that is not contiguous is copied.

    Returns: a tensor like x, computed in fp32 and rounded once; most of a long row is 0. A row with +inf or NaN in it,
        or of nothing but -inf, is NaN.
    Raises: TypeError for integers; ValueError for a tensor without dimensions; IndexError for a dimension that x lacks.
    """
    check_rows(x)
    if dim in (-1, x.ndim - 1):
        return _dispatch(SparsemaxOptions(), x)
    y: Tensor = _dispatch(SparsemaxOptions(), x.transpose(dim, -1))
    return y.transpose(dim, -1)


__getattr__ = compat_names(__name__, OPS["sparsemax"])
