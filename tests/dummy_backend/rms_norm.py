from __future__ import annotations

import torch
from torch import Tensor

from liger_kernel._core.contract import Grads, Needs, Saved
from liger_kernel.ops.rms_norm.contract import RMSNormOptions


def forward(
    x: Tensor, weight: Tensor | None, *, options: RMSNormOptions, needs: Needs
) -> tuple[Tensor, Saved]:
    rstd = torch.rsqrt(x.float().square().mean(-1, keepdim=True) + options.eps)
    normed = x.float() * rstd
    if options.casting_mode == "llama":
        normed = normed.to(x.dtype).float()
    if weight is not None:
        normed = normed * (weight.float() + options.offset)
    return normed.to(x.dtype), (x, weight, rstd)


def backward(grads: Grads, saved: Saved, *, options: RMSNormOptions, needs: Needs) -> Grads:
    x, weight, rstd = saved
    dy, normed = grads[0].float(), x.float() * rstd
    dnormed = dy if weight is None else dy * (weight.float() + options.offset)
    dx = rstd * (dnormed - normed * (dnormed * normed).mean(-1, keepdim=True))
    rounded = normed.to(x.dtype).float() if options.casting_mode == "llama" else normed
    dw = None
    if needs[1] and weight is not None:
        dw = (dy * rounded).reshape(-1, x.shape[-1]).sum(0).to(weight.dtype)
    return dx.to(x.dtype) if needs[0] else None, dw
