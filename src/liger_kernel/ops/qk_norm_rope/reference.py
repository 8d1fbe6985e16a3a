"""RMSNorm of heads and their rotary embedding in plain PyTorch: the specification."""

from __future__ import annotations

import torch
from torch import Tensor

from liger_kernel.ops.rope.reference import rope


def qk_norm_rope(
    q: Tensor,
    k: Tensor | None,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    eps: float,
    offset: float,
    casting_mode: str,
    unsqueeze_dim: int,
    rotary_dim: int | None,
    interleaved: bool,
) -> tuple[Tensor, Tensor | None]:
    """`rope` of x * rsqrt(mean(x^2) + eps) * (offset + weight) for q and k, each with its weight; (q', k').

    The mean is that of a head, or of all heads of a token where the weight has as many elements. Computed in fp32
    (float64 for float64) and rounded at the end; in the casting mode "llama" before the weight, too.
    """

    def normed(x: Tensor, weight: Tensor | None) -> Tensor:
        heads, size = x.shape[unsqueeze_dim], x.shape[-1]
        whole = weight is not None and weight.numel() == heads * size
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        of = (unsqueeze_dim, -1) if whole else (-1,)
        normed = wide * torch.rsqrt(wide.square().mean(of, keepdim=True) + eps)
        if casting_mode == "llama":
            normed = normed.to(x.dtype).to(wide.dtype)
        if weight is None:
            return normed
        weight = weight.reshape((heads, *(1,) * (2 - unsqueeze_dim), size) if whole else (size,))
        return normed * (offset + weight.to(wide.dtype))

    both = normed(q, q_weight), None if k is None else normed(k, k_weight)
    turned_q, turned_k = rope(*both, cos, sin, unsqueeze_dim, rotary_dim, interleaved)
    return turned_q.to(q.dtype), None if turned_k is None else turned_k.to(k.dtype)  # type: ignore[union-attr]
