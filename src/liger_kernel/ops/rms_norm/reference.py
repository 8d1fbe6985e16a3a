"""RMSNorm in plain PyTorch: the specification."""

import torch
from torch import Tensor


def rms_norm(
    x: Tensor, weight: Tensor | None, eps: float, offset: float, casting_mode: str
) -> Tensor:
    """y = x / sqrt(mean(x^2) + eps) * (offset + weight) over the last dimension, in the dtype of x.

    Statistics are taken in fp32 (float64 for float64 input), except in mode "none", where everything stays in the
    dtype of x. Mode "llama" rounds the normalised x to the dtype of x before the multiplication, "gemma" after it.
    """
    compute = x.dtype if casting_mode == "none" else torch.promote_types(x.dtype, torch.float32)
    values = x.to(compute)
    normed = values * torch.rsqrt(values.square().mean(-1, keepdim=True) + eps)
    if casting_mode == "llama":
        normed = normed.to(x.dtype)
    if weight is None:
        return normed.to(x.dtype)
    scale = weight.to(compute) if casting_mode == "gemma" else weight
    return (normed * (scale + offset if offset else scale)).to(x.dtype)
