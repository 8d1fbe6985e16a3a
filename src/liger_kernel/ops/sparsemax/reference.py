"""Sparsemax in plain PyTorch: the specification."""

import torch
from torch import Tensor

from liger_kernel.ops.softmax.reference import later_columns


def sparsemax(x: Tensor, causal: bool = False) -> Tensor:
    """y = max(x - tau, 0) over the last dimension, with the tau that makes it sum to 1, rounded once.

    All of it in fp32 (float64 for float64 input). tau is found among the sorted values, and summed again over those
    above it, whose gradient is dy less the mean of dy over them; that of the others is 0.
    """
    if not x.numel():
        return x.clone()
    if causal:
        later = later_columns(x)
        return sparsemax(x.masked_fill(later, float("-inf"))).masked_fill(later, 0)
    z = x.to(torch.promote_types(x.dtype, torch.float32))
    z = z - z.detach().amax(-1, keepdim=True)
    falling = z.detach().sort(-1, descending=True).values
    sums = falling.cumsum(-1)
    ranks = torch.arange(1, x.shape[-1] + 1, device=x.device)
    above = (1 + ranks * falling > sums).sum(-1, keepdim=True).clamp(min=1)
    outside = z <= (sums.gather(-1, above - 1) - 1) / above  # no NaN is
    tau = (z.masked_fill(outside, 0).sum(-1, keepdim=True) - 1) / above
    return (z - tau).masked_fill(outside, 0).to(x.dtype).contiguous()
