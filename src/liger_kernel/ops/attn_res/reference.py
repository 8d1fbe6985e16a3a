"""Attention over the outputs of earlier blocks in plain PyTorch: the specification."""

import torch
from torch import Tensor


def attn_res(blocks: Tensor, w_query: Tensor, w_norm: Tensor, eps: float, normed: bool) -> Tensor:
    """sum_i softmax_i(w_query . (w_norm n_i)) v_i of v_i = blocks[i] and n_i = RMSNorm(v_i), or of n_i if `normed`.

    In fp32 (float64 for float64 input).
    """
    compute = torch.promote_types(blocks.dtype, torch.float32)
    v = blocks.to(compute)
    n = v * torch.rsqrt(v.square().mean(-1, keepdim=True) + eps)
    scores = (n * w_norm.to(compute) * w_query.to(compute)).sum(-1, keepdim=True)
    return (torch.softmax(scores, 0) * (n if normed else v)).sum(0).to(blocks.dtype)
