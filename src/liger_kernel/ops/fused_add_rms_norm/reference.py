"""Residual addition followed by RMSNorm in plain PyTorch: the specification."""

import torch
from torch import Tensor


def fused_add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor | None, eps: float, offset: float, casting_mode: str
) -> tuple[Tensor, Tensor]:
    """s = x + residual in the dtype of x, and y = s / sqrt(mean(s^2) + eps) * (offset + weight); returns (y, s).

    The casting modes are those of `rms_norm`: statistics in fp32 except in mode "none"; "llama" rounds the normalised
    s to its dtype before the multiplication, "gemma" after it.
    """
    s = x + residual
    compute = s.dtype if casting_mode == "none" else torch.promote_types(s.dtype, torch.float32)
    values = s.to(compute)
    normed = values * torch.rsqrt(values.square().mean(-1, keepdim=True) + eps)
    if casting_mode == "llama":
        normed = normed.to(s.dtype)
    if weight is None:
        return normed.to(s.dtype), s
    scale = weight.to(compute) if casting_mode == "gemma" else weight
    return (normed * (scale + offset if offset else scale)).to(s.dtype), s
