"""The gated feed-forward block with low-rank adapters in plain PyTorch: the specification."""

from __future__ import annotations

from torch import Tensor

from liger_kernel.ops.glu.reference import glu
from liger_kernel.ops.lora_linear.reference import lora_linear


def lora_mlp(
    x: Tensor,
    gate_weight: Tensor,
    up_weight: Tensor,
    down_weight: Tensor,
    gate_a: Tensor,
    gate_b: Tensor,
    up_a: Tensor,
    up_b: Tensor,
    down_a: Tensor,
    down_b: Tensor,
    scaling: float,
    activation: str,
) -> Tensor:
    """down(f(gate(x)) * up(x)), where each of the three is a Linear without bias, and an adapter."""
    gate = lora_linear(x, gate_weight, None, gate_a, gate_b, scaling)
    up = lora_linear(x, up_weight, None, up_a, up_b, scaling)
    product = glu(gate, up, activation, 1.0, 1.0)
    return lora_linear(product, down_weight, None, down_a, down_b, scaling)
