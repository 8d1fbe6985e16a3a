"""The incumbent's names for hyper-connections, served by `mhc_project`, `mhc_sinkhorn` and `mhc_mix`.

`..._fwd` and `..._bwd` run without autograd and give fp32, in `out_...` if one is given. Launch configurations change
nothing, nor does `allow_fp32`: x may have any floating dtype.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from liger_kernel.backends import kernels_of
from liger_kernel.compat.function import autograd_function
from liger_kernel.ops.mhc_mix import mhc_post_res, mhc_pre
from liger_kernel.ops.mhc_project import mhc_project
from liger_kernel.ops.mhc_sinkhorn import mhc_coeffs, mhc_sinkhorn
from liger_kernel.ops.mhc_sinkhorn.contract import MHCSinkhornOptions


def _coeffs(
    x, phi, b, alpha_pre, alpha_post, alpha_res, allow_fp32, tmax, rms_eps, pre_eps, sinkhorn_eps, post_mult
):  # fmt: skip
    options = {"tmax": tmax, "pre_eps": pre_eps, "sinkhorn_eps": sinkhorn_eps}
    return mhc_coeffs(
        x, phi, b, alpha_pre, alpha_post, alpha_res, rms_eps, post_mult=post_mult, **options
    )


LigerMHCCoeffsFunction = autograd_function("LigerMHCCoeffsFunction", _coeffs)
LigerMHCPreFunction = autograd_function("LigerMHCPreFunction", lambda x, h_pre: mhc_pre(x, h_pre))
LigerMHCPostResFunction = autograd_function(
    "LigerMHCPostResFunction", lambda x, f_out, h_post, h_res: mhc_post_res(x, f_out, h_post, h_res)
)


def _into(out: Tensor | None, found: Tensor) -> Tensor:
    return found if out is None else out.copy_(found)


def _gradients(function: Any, grad_out: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
    """Of a function of these tensors in fp32."""
    leaves = [t.detach().float().requires_grad_() for t in tensors]
    with torch.enable_grad():
        output = function(*leaves)
    return torch.autograd.grad(output, leaves, grad_out.float())


@torch.no_grad()
def mhc_mm_norm_fwd(
    x, phi, eps, *, out_mix=None, out_invr=None, block_n=32, block_k=256, block_m=32, num_warps=4
):  # fmt: skip
    """(x phi invr (N, M), invr (N,)) with invr = 1 / sqrt(mean of x^2 + eps), of x (N, K)."""
    invr = torch.rsqrt(x.float().square().mean(-1) + eps)
    return _into(out_mix, mhc_project(x, phi, eps)), _into(out_invr, invr)


@torch.no_grad()
def mhc_mm_norm_bwd(
    x, phi, mix, invr, grad_mix, *, out_grad_x=None, out_grad_phi=None, block_n=32, block_k=256, block_m=32,
    num_warps=4
):  # fmt: skip
    """The gradients of x and phi, in their dtypes."""
    dz, wide = grad_mix * invr[:, None], x.float()
    along = (dz * mix).sum(-1, keepdim=True) * invr[:, None] / x.shape[-1]
    grad_x = (dz @ phi.float().t() - along * wide).to(x.dtype)
    return _into(out_grad_x, grad_x), _into(out_grad_phi, (wide.t() @ dz).to(phi.dtype))


@torch.no_grad()
def mhc_split_sinkhorn_fwd(
    mix, b, alpha_pre, alpha_post, alpha_res, *, tmax, pre_eps, sinkhorn_eps, post_mult, out_hpre=None,
    out_hpost=None, out_hres=None, out_hist=None, return_hist=False, num_warps=1
):  # fmt: skip
    """(h_pre, h_post, h_res); with `return_hist` also h_res after 1 to `tmax` iterations, (N, tmax, HC, HC)."""

    def found(iterations: int) -> tuple[Tensor, Tensor, Tensor]:
        alphas = (alpha_pre, alpha_post, alpha_res)
        return mhc_sinkhorn(mix, b, *alphas, iterations, pre_eps, sinkhorn_eps, post_mult)

    outs = tuple(map(_into, (out_hpre, out_hpost, out_hres), found(tmax)))
    if not return_hist:
        return outs
    hist = torch.stack([found(n)[2] for n in range(1, tmax + 1)], 1)
    return *outs, _into(out_hist, hist)


@torch.no_grad()
def mhc_sinkhorn_bwd(
    mix, b, alpha_res, grad_hres, *, tmax, sinkhorn_eps, hist=None, out_grad_logits=None, num_warps=1
):  # fmt: skip
    """The gradient (N, HC, HC) of the logits of h_res; `hist` is not needed."""
    options = MHCSinkhornOptions(tmax, sinkhorn_eps=sinkhorn_eps)
    one = mix.new_ones((), dtype=torch.float32)
    saved = (mix.float() * alpha_res, b, one, one, one)  # its gradient is that of the logits then
    found = kernels_of("mhc_sinkhorn", mix).backward(
        (None, None, grad_hres), saved, options=options, needs=(True, *(False,) * 4)
    )[0]
    return _into(out_grad_logits, found[:, 2 * grad_hres.shape[-1] :].reshape(grad_hres.shape))


@torch.no_grad()
def mhc_pre_fwd(x, h_pre, *, out=None, block_n=32, block_c=128, num_warps=4):
    return _into(out, mhc_pre(x.float(), h_pre))


def mhc_pre_bwd(
    x, h_pre, grad_out, *, out_grad_x=None, out_grad_h=None, block_n=32, block_c=128, num_warps=4
):  # fmt: skip
    return tuple(map(_into, (out_grad_x, out_grad_h), _gradients(mhc_pre, grad_out, x, h_pre)))


@torch.no_grad()
def mhc_post_res_fwd(
    x, f_out, h_post, h_res, *, out=None, block_n=None, block_c=None, num_warps=None, num_stages=None
):  # fmt: skip
    return _into(out, mhc_post_res(x.float(), f_out, h_post, h_res))


def mhc_post_res_bwd(
    x, f_out, h_post, h_res, grad_out, *, out_grad_x=None, out_grad_f=None, out_grad_hpost=None, out_grad_hres=None,
    block_n=None, block_c=None, num_warps=None, num_stages=None
):  # fmt: skip
    outs = (out_grad_x, out_grad_f, out_grad_hpost, out_grad_hres)
    return tuple(map(_into, outs, _gradients(mhc_post_res, grad_out, x, f_out, h_post, h_res)))
