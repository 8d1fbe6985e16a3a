"""LayerNorm over the last dimension (Ba, Kiros & Hinton 2016, https://arxiv.org/abs/1607.06450)."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from liger_kernel._core.autograd import Op
from liger_kernel._core.checks import check_parameters
from liger_kernel._core.dtensor import on_row_shards
from liger_kernel._core.lazy import compat_names
from liger_kernel.backends.dispatch import Dispatch
from liger_kernel.ops import OPS
from liger_kernel.ops.layer_norm import reference
from liger_kernel.ops.layer_norm.contract import LayerNormOptions


class _LayerNorm(Op):
    pass


def _native(
    options: LayerNormOptions, x: Tensor, weight: Tensor | None, bias: Tensor | None
) -> Tensor:
    """`F.layer_norm` in fp32: in 16 bits its backward rounds the statistics."""
    wide = torch.promote_types(x.dtype, torch.float32)
    w, b = (None if p is None else p.to(wide) for p in (weight, bias))
    return torch.nn.functional.layer_norm(x.to(wide), x.shape[-1:], w, b, options.eps).to(x.dtype)


def _by_torch(
    options: LayerNormOptions, x: Tensor, weight: Tensor | None, bias: Tensor | None
) -> Tensor | None:
    """`F.layer_norm` of 16-bit tensors of one dtype: on a GPU it computes in fp32, too, and rounds once.

    Not of fp32: its statistics of rows far from zero are less exact than two passes (1.03 of what is allowed).
    """
    if x.dtype.itemsize > 2 or any(p is not None and p.dtype != x.dtype for p in (weight, bias)):
        return None
    return torch.nn.functional.layer_norm(x, x.shape[-1:], weight, bias, options.eps)


_dispatch = Dispatch(
    "layer_norm",
    _LayerNorm,
    reference.layer_norm,
    shards=functools.partial(on_row_shards, n_rows_tensors=1),
    small=2**22,  # as for RMSNorm: there the host is the bound
    eager=_by_torch,
    native=_native,
)


def layer_norm(
    x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5
) -> Tensor:
    """LayerNorm: `(x - mean) / sqrt(mean((x - mean)^2) + eps) * weight + bias` over the last dimension.

    Args:
        x: (..., N), any floating dtype, any strides. A DTensor is normalised shard by shard, whole rows at a time.
        weight, bias: (N,) each, or None.
        eps: added to the variance.

    Returns: (..., N) in the dtype of x, computed in fp32 and rounded once, whatever the dtypes of weight and bias.
    Raises: ValueError for a weight or bias that does not fit; TypeError for integer tensors.
    """
    check_parameters(x, weight=weight, bias=bias)
    return _dispatch(LayerNormOptions(eps), x, weight, bias)


__getattr__ = compat_names(__name__, OPS["layer_norm"])
