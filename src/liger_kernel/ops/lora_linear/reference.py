"""A Linear with a low-rank adapter in plain PyTorch: the specification."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import linear


def lora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    scaling: float,
) -> Tensor:
    """x @ weight.T + bias + scaling * (x @ lora_a.T) @ lora_b.T, in the dtype of the first product."""
    y = linear(x, weight, bias)
    return (y + linear(linear(x.to(lora_a.dtype), lora_a), lora_b) * scaling).to(y.dtype)
