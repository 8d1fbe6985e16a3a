"""The coefficients of hyper-connections in plain PyTorch: the specification."""

import math

import torch
from torch import Tensor


def mhc_sinkhorn(
    mix: Tensor,
    b: Tensor,
    alpha_pre: Tensor,
    alpha_post: Tensor,
    alpha_res: Tensor,
    tmax: int,
    pre_eps: float,
    sinkhorn_eps: float,
    post_mult: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """(h_pre, h_post, h_res) in fp32 (float64 for float64 input), of mix (..., HC^2 + 2 HC).

    Its columns are HC logits of h_pre, HC of h_post, and the rows of those of h_res, each times its alpha, plus b.
    h_pre = sigmoid + pre_eps, h_post = post_mult sigmoid; h_res begins with the softmax of each row, plus sinkhorn_eps,
    and has its columns, then `tmax` - 1 times its rows and columns, divided by their sums plus sinkhorn_eps.
    """
    compute = torch.promote_types(mix.dtype, torch.float32)
    hc = math.isqrt(mix.shape[-1] + 1) - 1
    sizes = (hc, hc, hc * hc)
    alphas = (alpha_pre, alpha_post, alpha_res)
    pre, post, res = (
        m * alpha.to(compute).reshape(()) + c
        for m, alpha, c in zip(
            mix.to(compute).split(sizes, -1), alphas, b.to(compute).split(sizes), strict=True
        )
    )
    h_res = torch.softmax(res.unflatten(-1, (hc, hc)), -1) + sinkhorn_eps
    h_res = h_res / (h_res.sum(-2, keepdim=True) + sinkhorn_eps)
    for _ in range(tmax - 1):
        h_res = h_res / (h_res.sum(-1, keepdim=True) + sinkhorn_eps)
        h_res = h_res / (h_res.sum(-2, keepdim=True) + sinkhorn_eps)
    return torch.sigmoid(pre) + pre_eps, post_mult * torch.sigmoid(post), h_res
