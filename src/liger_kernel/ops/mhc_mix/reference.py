"""Weighted sums of residual streams in plain PyTorch: the specification."""

import torch
from torch import Tensor


def mhc_mix(
    x: Tensor, weights: Tensor, f: Tensor | None = None, f_weights: Tensor | None = None
) -> Tensor:
    """y[o] = sum_i weights[o, i] x[i] + f_weights[o] f, in fp32 (float64 for float64 input), rounded once."""
    compute = torch.promote_types(x.dtype, torch.float32)
    y = (weights.to(compute).unsqueeze(-1) * x.to(compute).unsqueeze(-3)).sum(-2)
    if f is not None and f_weights is not None:
        y = y + f_weights.to(compute).unsqueeze(-1) * f.to(compute).unsqueeze(-2)
    return y.to(x.dtype)
