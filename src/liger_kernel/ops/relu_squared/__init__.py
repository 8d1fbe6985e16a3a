"""Squared ReLU (So et al. 2021, Primer, https://arxiv.org/abs/2109.08668), the activation of Nemotron and Arcee."""

from __future__ import annotations

import torch
from torch import Tensor

from liger_kernel._core.autograd import Op
from liger_kernel._core.checks import check_floating
from liger_kernel._core.dtensor import on_shards
from liger_kernel.backends import kernels_of
from liger_kernel.backends.dispatch import Dispatch
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


class LigerReLUSquaredFunction:
    """`apply` in the argument order of the incumbent."""

    @staticmethod
    def apply(X: Tensor) -> Tensor:
        return relu_squared(X)


def relu_squared_forward(X: Tensor) -> Tensor:
    """max(X, 0)^2 like X. No autograd."""
    with torch.no_grad():
        return relu_squared(X)


def relu_squared_backward(X: Tensor, dY: Tensor) -> Tensor:
    """2 max(X, 0) dY, always a fresh tensor."""
    impl, saved = kernels_of("relu_squared", X), (X.contiguous(),)
    return impl.backward((dY,), saved, options=ReLUSquaredOptions(), needs=(True,))[0]
