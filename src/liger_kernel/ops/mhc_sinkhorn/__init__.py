"""The coefficients of hyper-connections (mHC, Xie et al. 2025, https://arxiv.org/abs/2512.24880): what streams give to
a layer, what they take from it, and a matrix that mixes them, doubly stochastic by Sinkhorn's iterations."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from liger_kernel._core.autograd import Op
from liger_kernel._core.checks import check_floating, check_same_device, check_scalar
from liger_kernel._core.lazy import compat_names
from liger_kernel.backends.dispatch import Dispatch, no_shards
from liger_kernel.ops import OPS
from liger_kernel.ops.mhc_project import mhc_project
from liger_kernel.ops.mhc_sinkhorn import reference
from liger_kernel.ops.mhc_sinkhorn.contract import MHCSinkhornOptions

Coefficients = tuple[Tensor, Tensor, Tensor]


class _MHCSinkhorn(Op):
    pass


_dispatch = Dispatch(
    "mhc_sinkhorn",
    _MHCSinkhorn,
    reference.mhc_sinkhorn,
    shards=no_shards("mhc_sinkhorn", "call it on the local shards, .to_local()"),
)


def mhc_sinkhorn(
    mix: Tensor,
    b: Tensor,
    alpha_pre: Tensor,
    alpha_post: Tensor,
    alpha_res: Tensor,
    tmax: int = 20,
    pre_eps: float = 0.0,
    sinkhorn_eps: float = 1e-6,
    post_mult: float = 2.0,
) -> Coefficients:
    """(h_pre, h_post, h_res) of the projection `mix` of the streams, see `reference.py`.

    Args:
        mix: (..., HC^2 + 2 HC), of which the first HC are for h_pre, HC for h_post, the rest for h_res, row by row.
        b: (HC^2 + 2 HC,). alpha_pre, alpha_post, alpha_res: one number each, of any shape; they stay on their device.
        tmax: how often the columns of h_res are normalised, the last time after all rows.

    Returns: (..., HC), (..., HC) and (..., HC, HC), in fp32.
    Raises: ValueError for shapes that do not fit, or a tmax below 1; TypeError for integers and DTensors.
    """
    check_floating(mix=mix, b=b)
    check_same_device(mix=mix, b=b)
    for name, alpha in (
        ("alpha_pre", alpha_pre),
        ("alpha_post", alpha_post),
        ("alpha_res", alpha_res),
    ):
        check_scalar(name, alpha, mix)
    size = mix.shape[-1] if mix.ndim else 0
    if size < 3 or math.isqrt(size + 1) ** 2 != size + 1 or b.shape != (size,):
        raise ValueError(
            f"mix {tuple(mix.shape)} and b {tuple(b.shape)} do not fit; pass (..., HC^2 + 2 HC) and (HC^2 + 2 HC,)."
        )
    if tmax < 1:
        raise ValueError(f"tmax={tmax} must be at least 1: h_res has its columns normalised once.")
    options = MHCSinkhornOptions(int(tmax), float(pre_eps), float(sinkhorn_eps), float(post_mult))
    return _dispatch(options, mix, b, alpha_pre, alpha_post, alpha_res)


def mhc_coeffs(
    x: Tensor,
    phi: Tensor,
    b: Tensor,
    alpha_pre: Tensor,
    alpha_post: Tensor,
    alpha_res: Tensor,
    rms_eps: float = 1e-6,
    **options: Any,
) -> Coefficients:
    """`mhc_sinkhorn` with `options` of the projection by phi (HC C, HC^2 + 2 HC) of streams x (..., HC, C).

    Returns: (h_pre, h_post, h_res) in fp32, whatever autocast says.
    """
    mix = mhc_project(x.flatten(-2), phi, rms_eps)
    return mhc_sinkhorn(mix, b, alpha_pre, alpha_post, alpha_res, **options)


__getattr__ = compat_names(__name__, OPS["mhc_sinkhorn"])
