"""Dynamic tanh, which stands in for a norm (Zhu et al. 2025, Transformers without Normalization,
https://arxiv.org/abs/2503.10622)."""

from __future__ import annotations

import functools

from torch import Tensor

from liger_kernel._core.autograd import Op
from liger_kernel._core.checks import check_parameters, check_scalar
from liger_kernel._core.dtensor import on_row_shards
from liger_kernel._core.lazy import compat_names
from liger_kernel.backends.dispatch import Dispatch
from liger_kernel.ops import OPS
from liger_kernel.ops.dyt import reference
from liger_kernel.ops.dyt.contract import DyTOptions


class _DyT(Op):
    pass


_dispatch = Dispatch(
    "dyt", _DyT, reference.dyt, shards=functools.partial(on_row_shards, n_rows_tensors=1)
)


def dyt(x: Tensor, alpha: Tensor, gamma: Tensor, beta: Tensor | None = None) -> Tensor:
    """Dynamic tanh: `tanh(alpha * x) * gamma + beta`.

    Args:
        x: (..., N), any floating dtype, any strides. A DTensor is computed shard by shard, whole rows at a time.
        alpha: one number, of any shape; it stays on its device.
        gamma: (N,). beta: (N,), or None.

    Returns: (..., N) in the dtype of x, computed in fp32 and rounded once, whatever the dtypes of the parameters.
    Raises: ValueError for a parameter that does not fit; TypeError for integer tensors.
    """
    check_parameters(x, gamma=gamma, beta=beta)
    check_scalar("alpha", alpha, x)
    return _dispatch(DyTOptions(), x, alpha, gamma, beta)


__getattr__ = compat_names(__name__, OPS["dyt"])
