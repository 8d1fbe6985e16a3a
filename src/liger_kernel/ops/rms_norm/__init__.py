"""RMSNorm (Zhang & Sennrich 2019, https://arxiv.org/abs/1910.07467) with the casting conventions of Llama and Gemma."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from liger_kernel._core.autograd import Op
from liger_kernel._core.checks import check_choice, check_last_dim, check_parameters
from liger_kernel._core.dtensor import on_row_shards
from liger_kernel._core.shapes import as_rows
from liger_kernel.backends.dispatch import Dispatch
from liger_kernel.ops.norms import CASTING_MODES, launch_configuration, mode_name, triton_kernels
from liger_kernel.ops.rms_norm import reference
from liger_kernel.ops.rms_norm.contract import RMSNormOptions

_FUSED_IN_TORCH = hasattr(torch.ops.aten, "_fused_rms_norm")


class _RMSNorm(Op):
    pass


def _by_torch(options: RMSNormOptions, x: Tensor, weight: Tensor | None) -> Tensor | None:
    """`F.rms_norm`, one kernel forward and two backward since torch 2.8, where it rounds once, and so no worse."""
    if weight is None or weight.dtype != x.dtype or options.offset or not _FUSED_IN_TORCH:
        return None
    if options.casting_mode == "none":
        return None
    return torch.nn.functional.rms_norm(x, x.shape[-1:], weight, options.eps)


_dispatch = Dispatch(
    "rms_norm",
    _RMSNorm,
    reference.rms_norm,
    shards=functools.partial(on_row_shards, n_rows_tensors=1),
    small=2**22,  # backward of 65536x128 takes 0.25 ms by torch, 0.025 by our kernels
    eager=_by_torch,
)


def rms_norm(
    x: Tensor,
    weight: Tensor | None,
    eps: float = 1e-6,
    offset: float = 0.0,
    casting_mode: str = "llama",
) -> Tensor:
    """RMSNorm over the last dimension: `x / sqrt(mean(x^2) + eps) * (offset + weight)`.

    Args:
        x: (..., N), any floating dtype, any strides. A DTensor is normalised shard by shard, whole rows at a time.
        weight: (N,), or None for no affine part.
        eps: added to the mean of squares.
        offset: added to the weight; 1.0 for models that store `weight - 1` (Gemma, Qwen3-Next).
        casting_mode: "llama" rounds the normalised x to the dtype of x before the weight is applied, "gemma" rounds
            once at the end, "none" promises no fp32 statistics (and is computed in fp32 where that is free).

    Returns: (..., N) in the dtype of x.
    Raises: ValueError for an unknown mode or a weight that does not fit; TypeError for integer tensors.
    """
    check_choice("casting_mode", casting_mode, CASTING_MODES)
    check_parameters(x, weight=weight)
    return _dispatch(RMSNormOptions(eps, offset, casting_mode), x, weight)


class LigerRMSNormFunction:
    """`apply` in the argument order of the incumbent; `in_place` and `row_mode` are accepted and change nothing."""

    @staticmethod
    def apply(
        X: Tensor,
        W: Tensor | None,
        eps: float,
        offset: float = 0.0,
        casting_mode: str = "llama",
        in_place: bool = True,
        row_mode: bool | None = None,
    ) -> Tensor:
        return rms_norm(X, W, eps, offset, casting_mode)


def rms_norm_forward(
    X: Tensor,
    W: Tensor | None,
    eps: float,
    offset: float,
    casting_mode: str | int,
    row_mode: bool | None = None,
) -> tuple[Tensor, Tensor, Tensor, int, int, int]:
    """(Y, X as rows, rstd, block size, warps, mode code) for `rms_norm_backward`: the Triton kernel without autograd.

    `row_mode` changes nothing. Raises ValueError for an unknown mode, RuntimeError where Triton cannot run.
    """
    mode = mode_name(casting_mode)
    check_last_dim("W", W, X.shape[-1], "X")
    impl = triton_kernels("rms_norm", X)
    options = RMSNormOptions(eps, offset, mode)
    y, (rows, _, rstd) = impl.forward(X, W, options=options, needs=(True, True))
    return y, rows, rstd, *launch_configuration(X), CASTING_MODES[mode]


def rms_norm_backward(
    dY: Tensor,
    X: Tensor,
    W: Tensor | None,
    RSTD: Tensor,
    offset: float,
    casting_mode: str | int,
    BLOCK_SIZE: int,
    num_warps: int,
    in_place: bool,
    row_mode: bool | None = None,
    needs_dw: bool | None = None,
) -> tuple[Tensor, Tensor | None]:
    """(dX, dW or None), always in fresh memory: `in_place`, `row_mode` and the launch configuration change nothing."""
    needs = (True, W is not None and needs_dw is not False)
    options = RMSNormOptions(0.0, offset, mode_name(casting_mode))
    impl = triton_kernels("rms_norm", X)
    return impl.backward((dY,), (as_rows(X), W, RSTD), options=options, needs=needs)
