"""Squared ReLU (So et al. 2021, Primer, https://arxiv.org/abs/2109.08668), the activation of Nemotron and Arcee."""

from __future__ import annotations

from torch import Tensor

from liger_kernel._core.autograd import Op
from liger_kernel._core.checks import check_floating
from liger_kernel._core.dtensor import on_shards
from liger_kernel._core.lazy import compat_names
from liger_kernel.backends.dispatch import Dispatch
from liger_kernel.ops import OPS
from liger_kernel.ops.relu_squared import reference
from liger_kernel.ops.relu_squared.contract import ReLUSquaredOptions


class _ReLUSquared(Op):
    pass


_dispatch = Dispatch(
    "relu_squared",
    _ReLUSquared,
    reference.relu_squared,
    shards=on_shards,
    small=2**23,  # as in `glu`
    eager=lambda options, x: reference.relu_squared(x),
)


def relu_squared(x: Tensor) -> Tensor:
    """Squared ReLU: `max(x, 0)^2`, elementwise.

    Args:
        x: any shape, floating dtype and strides. DTensors are computed shard by shard.

    Returns: a tensor like x, rounded once.
    Raises: TypeError for integers.
    """
    check_floating(x=x)
    return _dispatch(ReLUSquaredOptions(), x)


__getattr__ = compat_names(__name__, OPS["relu_squared"])
