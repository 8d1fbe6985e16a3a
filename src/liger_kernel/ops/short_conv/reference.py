"""The gated short convolution in plain PyTorch: the specification."""

import torch
import torch.nn.functional as F
from torch import Tensor


def short_conv(bcx: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """y[t] = C[t] * (bias + sum_k weight[:, k] (B x)[t - K + 1 + k]) in fp32 (float64 for float64 input), rounded once.

    B, C and x are the thirds of bcx, in this order; (B x)[t] is 0 before the sequence.
    """
    compute = torch.promote_types(bcx.dtype, torch.float32)
    b, c, x = bcx.to(compute).chunk(3, -1)
    steps, taps = bcx.shape[-2], weight.to(compute).unbind(-1)
    z = F.pad(b * x, (0, 0, len(taps) - 1, 0))
    y = sum(z[..., k : k + steps, :] * tap for k, tap in enumerate(taps))
    if bias is not None:
        y = y + bias.to(compute)
    return (c * y).to(bcx.dtype)
