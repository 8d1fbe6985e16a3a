"""The gated feed-forward block in plain PyTorch: the specification."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

ACTIVATIONS = {
    "silu": F.silu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "gelu": F.gelu,
}


def gated_mlp(
    x: Tensor,
    gate_weight: Tensor,
    up_weight: Tensor | None,
    down_weight: Tensor,
    activation: str,
    gate_multiplier: float,
) -> Tensor:
    """(f(gate_multiplier * x @ gate_weight.T) * (x @ up_weight.T)) @ down_weight.T, each product rounded as in eager code.

    Without `up_weight`, `gate_weight` (2F, H) holds both: the gate in its first half, up in its second.
    """
    gate = F.linear(x, gate_weight)
    if up_weight is None:
        gate, up = gate.chunk(2, -1)
    else:
        up = F.linear(x, up_weight)
    if gate_multiplier != 1:
        gate = gate * gate_multiplier
    return F.linear(ACTIVATIONS[activation](gate) * up, down_weight)
