"""LayerNorm over the last dimension (Ba, Kiros & Hinton 2016, https://arxiv.org/abs/1607.06450)."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from liger_kernel._core.autograd import Op
from liger_kernel._core.checks import check_last_dim, check_parameters
from liger_kernel._core.dtensor import on_row_shards
from liger_kernel._core.shapes import as_rows
from liger_kernel.backends.dispatch import Dispatch
from liger_kernel.ops.layer_norm import reference
from liger_kernel.ops.layer_norm.contract import LayerNormOptions
from liger_kernel.ops.norms import launch_configuration, triton_kernels


class _LayerNorm(Op):
    pass


def _by_torch(
    options: LayerNormOptions, x: Tensor, weight: Tensor | None, bias: Tensor | None
) -> Tensor | None:
    """`F.layer_norm` of 16-bit tensors of one dtype: it computes in fp32, too, and rounds once.

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


class LigerLayerNormFunction:
    """`apply` in the argument order of the incumbent."""

    @staticmethod
    def apply(X: Tensor, W: Tensor | None, B: Tensor | None, eps: float) -> Tensor:
        return layer_norm(X, W, B, eps)


def layer_norm_forward(
    X: Tensor, W: Tensor | None, B: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, int, int]:
    """(Y, X as rows, mean, rstd, block size, warps), both statistics fp32: the Triton kernel without autograd.

    Raises ValueError for a W or B that does not fit, RuntimeError where Triton cannot run.
    """
    check_last_dim("W", W, X.shape[-1], "X")
    check_last_dim("B", B, X.shape[-1], "X")
    impl = triton_kernels("layer_norm", X)
    y, (rows, _, _, mean, rstd) = impl.forward(
        X, W, B, options=LayerNormOptions(eps), needs=(True, True, True)
    )
    return y, rows, mean, rstd, *launch_configuration(X)


def layer_norm_backward(
    dY: Tensor,
    X: Tensor,
    W: Tensor | None,
    B: Tensor | None,
    Mean: Tensor,
    RSTD: Tensor,
    needs_dw: bool | None = None,
    needs_db: bool | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """(dX, dW or None, dB or None) from what `layer_norm_forward` returned; dX in the shape of dY."""
    needs = (True, W is not None and needs_dw is not False, B is not None and needs_db is not False)
    saved = (as_rows(X), W, B, Mean, RSTD)
    impl = triton_kernels("layer_norm", X)
    return impl.backward((dY,), saved, options=LayerNormOptions(0.0), needs=needs)
