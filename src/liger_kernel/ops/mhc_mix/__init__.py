"""Weighted sums of residual streams: how hyper-connections (Zhu et al. 2024, https://arxiv.org/abs/2409.19606; mHC, Xie
et al. 2025, https://arxiv.org/abs/2512.24880) lead streams into a layer, and its output and the streams back."""

from __future__ import annotations

from torch import Tensor

from liger_kernel._core.autograd import Op
from liger_kernel._core.checks import check_floating, check_same_device
from liger_kernel._core.lazy import compat_names
from liger_kernel.backends.dispatch import Dispatch, no_shards
from liger_kernel.ops import OPS
from liger_kernel.ops.mhc_mix import reference
from liger_kernel.ops.mhc_mix.contract import MHCMixOptions


class _MHCMix(Op):
    pass


_dispatch = Dispatch(
    "mhc_mix",
    _MHCMix,
    reference.mhc_mix,
    shards=no_shards("mhc_mix", "call it on the local shards, .to_local()"),
)


def mhc_mix(
    x: Tensor, weights: Tensor, f: Tensor | None = None, f_weights: Tensor | None = None
) -> Tensor:
    """Streams mixed token by token: `y[o] = sum_i weights[o, i] * x[i] + f_weights[o] * f`.

    Args:
        x: (..., I, C), the streams of each token, any floating dtype, any strides.
        weights: (..., O, I).
        f, f_weights: (..., C), one more stream, and (..., O), its weights; both or neither.

    Returns: (..., O, C) in the dtype of x, computed in fp32 and rounded once.
    Raises: ValueError for shapes that do not fit; TypeError for integers and DTensors.
    """
    check_floating(x=x, weights=weights, f=f, f_weights=f_weights)
    check_same_device(x=x, weights=weights, f=f, f_weights=f_weights)
    tokens, outs = x.shape[:-2], weights.shape[-2:-1]
    fit = x.ndim >= 2 and weights.ndim >= 2 and weights.shape == (*tokens, *outs, x.shape[-2])
    if (f is None) != (f_weights is None):
        fit = False
    elif f is not None and f_weights is not None:
        fit = fit and f.shape == (*tokens, x.shape[-1]) and f_weights.shape == (*tokens, *outs)
    if not fit:
        named = {"x": x, "weights": weights, "f": f, "f_weights": f_weights}
        shapes = ", ".join(f"{n} {None if t is None else tuple(t.shape)}" for n, t in named.items())
        raise ValueError(
            f"{shapes} do not fit each other; pass (..., I, C), (..., O, I), and both or neither of (..., C), (..., O)."
        )
    return _dispatch(MHCMixOptions(), x, weights, f, f_weights)


def mhc_pre(x: Tensor, h_pre: Tensor) -> Tensor:
    """What the layer gets: (..., C) = sum over the streams of h_pre (..., HC) times x (..., HC, C), by `mhc_mix`."""
    return mhc_mix(x, h_pre.unsqueeze(-2)).squeeze(-2)


def mhc_post_res(x: Tensor, f_out: Tensor, h_post: Tensor, h_res: Tensor) -> Tensor:
    """The next streams (..., HC, C): h_res (..., HC, HC) times x, and h_post (..., HC) times f_out, by `mhc_mix`."""
    return mhc_mix(x, h_res, f_out, h_post)


__getattr__ = compat_names(__name__, OPS["mhc_mix"])
