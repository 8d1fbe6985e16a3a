"""Gated short convolution, the token mixer of LFM2 (Liquid AI 2025, https://arxiv.org/abs/2511.23404): two gates around
a causal convolution of each channel, over a few tokens."""

from __future__ import annotations

from torch import Tensor

from liger_kernel._core.autograd import Op
from liger_kernel._core.checks import check_floating, check_same_device
from liger_kernel._core.lazy import compat_names
from liger_kernel.backends.dispatch import Dispatch, no_shards
from liger_kernel.ops import OPS
from liger_kernel.ops.short_conv import reference
from liger_kernel.ops.short_conv.contract import ShortConvOptions


class _ShortConv(Op):
    pass


_dispatch = Dispatch(
    "short_conv",
    _ShortConv,
    reference.short_conv,
    shards=no_shards("short_conv", "call it on the local shards, .to_local()"),
)


def short_conv(bcx: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`C * conv(B * x)`: a causal convolution of each channel between two gates.

    Args:
        bcx: (..., S, 3 C), side by side what gates the input, what gates the output, and the input; any floating
            dtype, any strides. S tokens are one sequence, which begins with zeros.
        weight: (C, K), the last tap is that of the token itself; of a `nn.Conv1d`, `.weight.squeeze(1)`.
        bias: (C,), or None.

    Returns: (..., S, C) in the dtype of bcx, computed in fp32 and rounded once.
    Raises: ValueError for shapes that do not fit each other; TypeError for integers and DTensors.
    """
    check_floating(bcx=bcx, weight=weight, bias=bias)
    check_same_device(bcx=bcx, weight=weight, bias=bias)
    channels = bcx.shape[-1] // 3 if bcx.ndim > 1 else -1
    fit = weight.ndim == 2 and weight.shape[0] == channels and weight.shape[1] > 0
    fit = fit and bcx.shape[-1] == 3 * channels
    if not fit or (bias is not None and bias.shape != (channels,)):
        named = {"bcx": bcx, "weight": weight, "bias": bias}
        shapes = ", ".join(f"{n} {None if t is None else tuple(t.shape)}" for n, t in named.items())
        raise ValueError(
            f"{shapes} do not fit each other; pass (..., S, 3 C), (C, K) with K of 1 or more, and (C,) or None."
        )
    return _dispatch(ShortConvOptions(), bcx, weight, bias)


__getattr__ = compat_names(__name__, OPS["short_conv"])
