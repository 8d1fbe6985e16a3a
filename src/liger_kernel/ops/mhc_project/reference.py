"""The normalised projection of hyper-connections in plain PyTorch: the specification."""

import contextlib
from typing import Any

import torch
from torch import Tensor


def mhc_project(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """(x @ weight) / sqrt(mean(x^2) + eps) in fp32 (float64 for float64 input), under autocast, too; not rounded."""
    compute = torch.promote_types(x.dtype, torch.float32)
    plain: Any = contextlib.nullcontext()
    if not x.is_meta:
        plain = torch.autocast(x.device.type, enabled=False)
    with plain:
        x = x.to(compute)
        return (x @ weight.to(compute)) * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
