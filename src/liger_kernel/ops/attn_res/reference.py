"""Attention over the outputs of earlier blocks in plain PyTorch: the specification."""

import torch
from torch import Tensor


def attn_res(blocks: Tensor, w_query: Tensor, w_norm: Tensor, eps: float) -> Tensor:
    """sum_i softmax_i(w_query . (w_norm RMSNorm(v_i))) v_i of v_i = blocks[i], in fp32 (float64 for float64 input)."""
    compute = torch.promote_types(blocks.dtype, torch.float32)
    v = blocks.to(compute)
    keys = v * torch.rsqrt(v.square().mean(-1, keepdim=True) + eps) * w_norm.to(compute)
    alpha = torch.softmax((keys * w_query.to(compute)).sum(-1, keepdim=True), 0)
    return (alpha * v).sum(0).to(blocks.dtype)
