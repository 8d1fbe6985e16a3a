"""Squared ReLU (So et al. 2021, Primer, https://arxiv.org/abs/2109.08668), the activation of Nemotron and Arcee."""

from __future__ import annotations

import torch
from torch import Tensor

from liger_kernel._core.autograd import Op
from liger_kernel._core.checks import check_floating
from liger_kernel._core.dtensor import is_dtensor, on_shards
from liger_kernel.backends import host_bound, implementation
from liger_kernel.ops.relu_squared import reference

#: elements up to which the two eager kernels are taken on a GPU, as in `glu`
_SMALL = 2**23


def relu_squared(x: Tensor) -> Tensor:
    """Squared ReLU: `max(x, 0)^2`, elementwise.

    Args:
        x: any shape, floating dtype and strides. DTensors are computed shard by shard.

    Returns: a tensor like x, rounded once.
    Raises: TypeError for integers.
    """
    check_floating(x=x)
    # Inductor fuses it with its neighbours; for small tensors two C++ ops cost less than one of ours
    if torch.compiler.is_compiling() or host_bound(x, _SMALL):
        return reference.relu_squared(x)
    if is_dtensor(x):
        return on_shards(relu_squared, x, shape=x.shape)
    return _ReLUSquared.apply(implementation("relu_squared", x), (), x)


class _ReLUSquared(Op):
    pass


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
    return implementation("relu_squared", X).backward((dY,), (X.contiguous(),), (), (True,))[0]
