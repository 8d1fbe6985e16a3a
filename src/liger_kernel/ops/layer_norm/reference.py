"""LayerNorm in plain PyTorch: the specification."""

import torch
from torch import Tensor


def layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """y = (x - mean) / sqrt(mean((x - mean)^2) + eps) * weight + bias over the last dimension.

    All of it in fp32 (float64 for float64 input), rounded once to the dtype of x.
    """
    compute = torch.promote_types(x.dtype, torch.float32)
    values = x.to(compute)
    centered = values - values.mean(-1, keepdim=True)
    y = centered * torch.rsqrt(centered.square().mean(-1, keepdim=True) + eps)
    if weight is not None:
        y = y * weight.to(compute)
    if bias is not None:
        y = y + bias.to(compute)
    return y.to(x.dtype).contiguous()  # as F.layer_norm returns it, whatever the strides of x
