"""GroupNorm in plain PyTorch: the specification."""

import torch
from torch import Tensor


def group_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, num_groups: int, eps: float
) -> Tensor:
    """y = (x - mean) / sqrt(mean((x - mean)^2) + eps) * weight + bias, the means over the channels of a group.

    All of it in fp32 (float64 for float64 input), rounded once to the dtype of x.
    """
    compute = torch.promote_types(x.dtype, torch.float32)
    groups = x.to(compute).flatten(1).unflatten(1, (num_groups, -1))
    centered = groups - groups.mean(-1, keepdim=True)
    y = centered * torch.rsqrt(centered.square().mean(-1, keepdim=True) + eps)
    y = y.reshape(x.shape)
    of_channel = (-1, *(1,) * (x.ndim - 2))
    if weight is not None:
        y = y * weight.to(compute).reshape(of_channel)
    if bias is not None:
        y = y + bias.to(compute).reshape(of_channel)
    return y.to(x.dtype).contiguous()
