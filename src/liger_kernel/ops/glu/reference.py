"""Gated activation in plain PyTorch: the specification."""

import torch.nn.functional as F
from torch import Tensor

ACTIVATIONS = {"silu": F.silu, "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"), "gelu": F.gelu}


def glu(
    gate: Tensor, up: Tensor | None, activation: str, gate_multiplier: float, down_multiplier: float
) -> Tensor:
    """f(gate * gate_multiplier) * up * down_multiplier, every product rounded to the dtype of gate as in eager code.

    Without `up`, the last dimension of `gate` holds both: the gate in its first half, up in its second.
    """
    if up is None:
        gate, up = gate.chunk(2, -1)
    if gate_multiplier != 1:
        gate = gate * gate_multiplier
    product = ACTIVATIONS[activation](gate) * up
    return product * down_multiplier if down_multiplier != 1 else product
