"""PolyNorm, a polynomial of normalised powers (Zhuo et al. 2024, Polynomial Composition Activations,
https://arxiv.org/abs/2411.03884)."""

from __future__ import annotations

import functools

from torch import Tensor

from liger_kernel._core.autograd import Op
from liger_kernel._core.checks import check_floating, check_rows, check_same_device, check_scalar
from liger_kernel._core.dtensor import on_row_shards
from liger_kernel._core.lazy import compat_names
from liger_kernel.backends.dispatch import Dispatch
from liger_kernel.ops import OPS
from liger_kernel.ops.poly_norm import reference
from liger_kernel.ops.poly_norm.contract import PolyNormOptions


class _PolyNorm(Op):
    pass


_dispatch = Dispatch(
    "poly_norm",
    _PolyNorm,
    reference.poly_norm,
    shards=functools.partial(on_row_shards, n_rows_tensors=1),
)


def check_weight(x: Tensor, weight: Tensor, bias: Tensor) -> None:
    check_rows(x)
    check_floating(weight=weight)
    check_same_device(x=x, weight=weight)
    if weight.shape != (3,):
        raise ValueError(
            f"weight has shape {tuple(weight.shape)}, but there are three powers; pass a tensor of shape (3,)."
        )
    check_scalar("bias", bias, x)


def poly_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-6) -> Tensor:
    """PolyNorm: `w0 n(x^3) + w1 n(x^2) + w2 n(x) + b`, with `n(u) = u / sqrt(mean(u^2) + eps)` over the last dimension.

    Args:
        x: (..., N), any floating dtype, any strides. A DTensor is computed shard by shard, whole rows at a time.
        weight: (3,), of the third, the second and the first power.
        bias: one number, of any shape.
        eps: added to each mean of squares.

    Returns: (..., N) in the dtype of x, computed in fp32 and rounded once, whatever the dtypes of weight and bias.
    Raises: ValueError for a weight or bias that does not fit; TypeError for integer tensors.
    """
    check_weight(x, weight, bias)
    return _dispatch(PolyNormOptions(eps), x, weight, bias)


__getattr__ = compat_names(__name__, OPS["poly_norm"])
