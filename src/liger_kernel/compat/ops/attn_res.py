"""The incumbent's names for attention residuals."""

from __future__ import annotations

import torch

from liger_kernel.compat.function import autograd_function
from liger_kernel.ops.attn_res import attn_res

LigerAttnResFunction = autograd_function(
    "LigerAttnResFunction",
    lambda V_stacked, w_query, w_norm, eps: attn_res(V_stacked, w_query, w_norm, eps),
)


@torch.no_grad()
def attn_res_forward(blocks, w_query, w_norm, eps=1e-6):
    """(h, the blocks as (N, T, D), their weights (T, N) and 1 / sqrt(mean of v^2 + eps) (T, N), both fp32)."""
    v = blocks if isinstance(blocks, torch.Tensor) else torch.stack(tuple(blocks))
    h, v = attn_res(v, w_query, w_norm, eps), v.reshape(v.shape[0], -1, v.shape[-1])
    rstd = torch.rsqrt(v.float().square().mean(-1) + eps)
    scores = rstd * (v.float() @ (w_query.float() * w_norm.float()))
    return h, v, scores.softmax(0).t().contiguous(), rstd.t().contiguous()


def attn_res_backward(dh, V_3d, w_query, w_norm, Alpha, RSTD, eps=1e-6):
    """The gradients of the blocks (N, T, D), of w_query and of w_norm; weights and norms are computed anew."""
    leaves = v, query, norm = [t.detach().requires_grad_() for t in (V_3d, w_query, w_norm)]
    with torch.enable_grad():
        h = attn_res(v, query, norm, eps)
    return torch.autograd.grad(h, leaves, dh.reshape(h.shape))
