"""The residual addition and the RMSNorm (Zhang & Sennrich 2019, https://arxiv.org/abs/1910.07467) after it."""

from __future__ import annotations

import functools

from torch import Tensor

from liger_kernel._core.autograd import Op
from liger_kernel._core.checks import (
    check_choice,
    check_last_dim,
    check_parameters,
    check_same_device,
)
from liger_kernel._core.dtensor import on_row_shards
from liger_kernel.backends.dispatch import Dispatch
from liger_kernel.ops.fused_add_rms_norm import reference
from liger_kernel.ops.fused_add_rms_norm.contract import FusedAddRMSNormOptions
from liger_kernel.ops.norms import CASTING_MODES, launch_configuration, mode_name, triton_kernels


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
    residual: Tensor,
    weight: Tensor | None,
    eps: float = 1e-6,
    offset: float = 0.0,
    casting_mode: str = "llama",
) -> tuple[Tensor, Tensor]:
    """`s = x + residual` and `y = s / sqrt(mean(s^2) + eps) * (offset + weight)`.

    Args:
        x, residual: (..., N), one floating dtype, any strides; they get the same gradient.
        weight, eps, offset, casting_mode: as in `rms_norm`.

    Returns: (y, s), each (..., N) in the dtype of x. y is computed from s as rounded; where only one of the two is
        used, backward spends nothing on the other.
    Raises: ValueError for an unknown mode, or shapes or dtypes that do not fit; TypeError for integer tensors.
    """
    check_choice("casting_mode", casting_mode, CASTING_MODES)
    check_parameters(x, weight=weight)
    if x.shape != residual.shape or x.dtype != residual.dtype:
        raise ValueError(
            f"x and residual must have one shape and dtype, got {x.dtype} {tuple(x.shape)} and {residual.dtype} "
            f"{tuple(residual.shape)}; expand or convert one of them."
        )
    check_same_device(x=x, residual=residual)
    return _dispatch(FusedAddRMSNormOptions(eps, offset, casting_mode), x, residual, weight)


class LigerFusedAddRMSNormFunction:
    """`apply` in the argument order of the incumbent; `in_place` is accepted and changes nothing."""

    @staticmethod
    def apply(
        X: Tensor,
        R: Tensor,
        W: Tensor | None,
        eps: float,
        offset: float = 0.0,
        casting_mode: str = "llama",
        in_place: bool = False,
    ) -> tuple[Tensor, Tensor]:
        return fused_add_rms_norm(X, R, W, eps, offset, casting_mode)


def fused_add_rms_norm_forward(
    X: Tensor, R: Tensor, W: Tensor | None, eps: float, offset: float, casting_mode: str | int
) -> tuple[Tensor, Tensor, Tensor, int, int, int, int]:
    """(Y, S, rstd, block size, warps, stages, mode code) for the backward helper: the Triton kernel without autograd.

    Raises ValueError for an unknown mode, RuntimeError where Triton cannot run.
    """
    mode = mode_name(casting_mode)
    check_last_dim("W", W, X.shape[-1], "X")
    impl = triton_kernels("fused_add_rms_norm", X)
    options = FusedAddRMSNormOptions(eps, offset, mode)
    (y, s), (_, _, rstd) = impl.forward(X, R, W, options=options, needs=(True, True, True))
    return y, s, rstd, *launch_configuration(X), 2, CASTING_MODES[mode]


def fused_add_rms_norm_backward(
    dY: Tensor,
    dS_out: Tensor | None,
    S: Tensor,
    W: Tensor | None,
    RSTD: Tensor,
    offset: float,
    casting_mode: str | int,
    BLOCK_SIZE: int,
    num_warps: int,
    num_stages: int,
    in_place: bool,
    needs_dw: bool | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """(dX, the same dX as gradient of R, dW or None), in fresh memory: `in_place` and the launch configuration change
    nothing."""
    needs = (True, True, W is not None and needs_dw is not False)
    options = FusedAddRMSNormOptions(0.0, offset, mode_name(casting_mode))
    impl = triton_kernels("fused_add_rms_norm", S)
    return impl.backward((dY, dS_out), (S, W, RSTD), options=options, needs=needs)
