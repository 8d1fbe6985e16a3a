"""Gated activation in plain PyTorch: the specification."""

import torch
import torch.nn.functional as F
from torch import Tensor


def _silu(x: Tensor, alpha: float) -> Tensor:
    return F.silu(x) if alpha == 1 else x * torch.sigmoid(alpha * x)


ACTIVATIONS = {
    "silu": _silu,
    "gelu_tanh": lambda x, _: F.gelu(x, approximate="tanh"),
    "gelu": lambda x, _: F.gelu(x),
    "silu_oai": _silu,
    "silu_step": _silu,
}


def glu(
    gate: Tensor,
    up: Tensor | None,
    activation: str,
    gate_multiplier: float,
    down_multiplier: float,
    limit: float | None = None,
    alpha: float = 1.0,
    interleaved: bool = False,
) -> Tensor:
    """f(gate * gate_multiplier) * up * down_multiplier, every product rounded to the dtype of gate as in eager code.

    Without `up`, the last dimension of `gate` holds both: the gate in its first half, up in its second; or the one in
    even, the other in odd places. `limit` bounds the gate from above and up on both sides, "silu_step" f instead of the
    gate. "silu_oai" adds 1 to up.
    """
    if up is None:
        gate, up = (gate[..., ::2], gate[..., 1::2]) if interleaved else gate.chunk(2, -1)
    if gate_multiplier != 1:
        gate = gate * gate_multiplier
    if limit is not None:
        up = up.clamp(-limit, limit)
    if limit is not None and activation != "silu_step":
        gate = gate.clamp(max=limit)
    value = ACTIVATIONS[activation](gate, alpha)
    if limit is not None and activation == "silu_step":
        value = value.clamp(max=limit)
    product = value * (up + 1 if activation == "silu_oai" else up)
    return product * down_multiplier if down_multiplier != 1 else product
