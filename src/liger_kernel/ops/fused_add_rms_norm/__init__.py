"""The residual addition and the RMSNorm (Zhang & Sennrich 2019, https://arxiv.org/abs/1910.07467) after it."""

from __future__ import annotations

import functools

from torch import Tensor

from liger_kernel._core.autograd import Op
from liger_kernel._core.checks import check_choice, check_parameters, check_same_device
from liger_kernel._core.dtensor import on_row_shards
from liger_kernel._core.lazy import compat_names
from liger_kernel.backends.dispatch import Dispatch
from liger_kernel.ops import OPS
from liger_kernel.ops.fused_add_rms_norm import reference
from liger_kernel.ops.fused_add_rms_norm.contract import FusedAddRMSNormOptions
from liger_kernel.ops.norms import CASTING_MODES


class _FusedAddRMSNorm(Op):
    pass


_dispatch = Dispatch(
    "fused_add_rms_norm",
    _FusedAddRMSNorm,
    reference.fused_add_rms_norm,
    shards=functools.partial(on_row_shards, n_rows_tensors=2),
)


def fused_add_rms_norm(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    eps: float = 1e-6,
    offset: float = 0.0,
    casting_mode: str = "llama",
) -> tuple[Tensor, Tensor]:
    """`s = x + residual` and `y = s / sqrt(mean(s^2) + eps) * (offset + weight)`.

    Args:
        x, residual: (..., N), one floating dtype, any strides; they get the same gradient. Without a residual s is x:
            who goes on with s in the place of x has its gradient added where that of the norm is made.
        weight, eps, offset, casting_mode: as in `rms_norm`.

    Returns: (y, s), each (..., N) in the dtype of x. y is computed from s as rounded; where only one of the two is
        used, backward spends nothing on the other.
    Raises: ValueError for an unknown mode, or shapes or dtypes that do not fit; TypeError for integer tensors.
    """
    check_choice("casting_mode", casting_mode, CASTING_MODES)
    check_parameters(x, weight=weight)
    if residual is not None and (x.shape != residual.shape or x.dtype != residual.dtype):
        raise ValueError(
            f"x and residual must have one shape and dtype, got {x.dtype} {tuple(x.shape)} and {residual.dtype} "
            f"{tuple(residual.shape)}; expand or convert one of them."
        )
    check_same_device(x=x, residual=residual)
    return _dispatch(FusedAddRMSNormOptions(eps, offset, casting_mode), x, residual, weight)


__getattr__ = compat_names(__name__, OPS["fused_add_rms_norm"])
