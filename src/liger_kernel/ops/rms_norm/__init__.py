"""RMSNorm (Zhang & Sennrich 2019, https://arxiv.org/abs/1910.07467) with the casting conventions of Llama and Gemma."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from liger_kernel._core.autograd import Op
from liger_kernel._core.checks import check_choice, check_parameters
from liger_kernel._core.dtensor import on_row_shards
from liger_kernel._core.lazy import compat_names
from liger_kernel.backends.dispatch import Dispatch
from liger_kernel.ops import OPS
from liger_kernel.ops.norms import CASTING_MODES
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
    return torch.rms_norm(x, x.shape[-1:], weight, options.eps)


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


__getattr__ = compat_names(__name__, OPS["rms_norm"])
