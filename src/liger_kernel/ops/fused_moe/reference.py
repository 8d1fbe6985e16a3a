"""A mixture of experts in plain PyTorch: the specification."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

ACTIVATIONS = {
    "silu": F.silu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "gelu": F.gelu,
    "relu_squared": lambda x: F.relu(x).square(),
}


def fused_moe(
    x: Tensor,
    gate_up_weight: Tensor,
    down_weight: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
    gate_up_bias: Tensor | None,
    down_bias: Tensor | None,
    gate_up_a: Tensor | None = None,
    gate_up_b: Tensor | None = None,
    down_a: Tensor | None = None,
    down_b: Tensor | None = None,
    *,
    activation: str,
    gated: bool,
    interleaved: bool,
    transposed: bool,
    limit: float | None,
    alpha: float,
    up_shift: float,
    gate_up_scaling: float,
    down_scaling: float,
) -> Tensor:
    """out[t] = sum_k w[t, k] (act(x[t] @ W1[e] + b1[e]) @ W2[e] + b2[e]) with e = index[t, k]; nothing for e = E.

    W + scaling (B A)^T takes the place of W where there are A (E, R, in) and B (E, out, R), in the dtype of W.
    Every step is rounded as in eager code; the sum over k is rounded once.
    """
    if x.is_meta:  # nobody knows there who goes to which expert
        return torch.empty_like(x, memory_format=torch.contiguous_format)
    if not transposed:
        gate_up_weight, down_weight = gate_up_weight.mT, down_weight.mT
    dtype = torch.promote_types(x.dtype, top_k_weights.dtype)
    shares = x.new_zeros(*top_k_index.shape, x.shape[1], dtype=dtype)  # (T, K, H)
    for expert in range(gate_up_weight.shape[0]):
        chosen = top_k_index == expert
        token, k = (None, None) if _is_followed() else torch.where(chosen)
        w1 = _adapted(gate_up_weight, gate_up_a, gate_up_b, gate_up_scaling, expert)
        w2 = _adapted(down_weight, down_a, down_b, down_scaling, expert)
        hidden = (x if token is None else x[token]) @ w1
        if gate_up_bias is not None:
            hidden = hidden + gate_up_bias[expert]
        act = activate(hidden, activation, gated, interleaved, limit, alpha, up_shift)
        y = act @ w2
        if down_bias is not None:
            y = y + down_bias[expert]
        if token is None:
            share = (y[:, None] * top_k_weights[..., None]).to(dtype)
            shares = torch.where(chosen[..., None], share, shares)
            continue
        share = y * top_k_weights[token, k, None]
        shares = shares.index_put((token, k), share.to(dtype))
    return shares.sum(1).to(x.dtype)


def _adapted(
    weight: Tensor, a: Tensor | None, b: Tensor | None, scaling: float, expert: int
) -> Tensor:
    """(in, out)"""
    if a is None or b is None:
        return weight[expert]
    a, b = (t[expert].to(weight.dtype) for t in (a, b))
    return weight[expert] + scaling * (b @ a).mT


def _is_followed() -> bool:
    """By vmap or a tracer: no shape may depend on who chose an expert, and all rows go to all of them."""
    return (
        torch._C._are_functorch_transforms_active()
        or torch._C._get_tracing_state() is not None
        or torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.PROXY) is not None
    )


def activate(
    hidden: Tensor,
    activation: str,
    gated: bool,
    interleaved: bool,
    limit: float | None,
    alpha: float,
    up_shift: float,
) -> Tensor:
    """f(alpha gate) / alpha (up + up_shift), gate cut off above `limit` and up on both sides; or f of all of it."""
    gate, up = hidden, None
    if gated and interleaved:
        gate, up = hidden[..., ::2], hidden[..., 1::2]
    elif gated:
        gate, up = hidden.chunk(2, -1)
    if limit is not None:
        gate = gate.clamp(max=limit)
        up = None if up is None else up.clamp(-limit, limit)
    if alpha == 1:
        value = ACTIVATIONS[activation](gate)
    elif activation == "silu":
        value = gate * torch.sigmoid(gate * alpha)
    else:
        value = ACTIVATIONS[activation](gate * alpha) / alpha
    if up is None:
        return value
    return value * (up + up_shift if up_shift else up)
