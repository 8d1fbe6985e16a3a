"""The gated feed-forward block in plain PyTorch: the specification."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor
from torch.nn.functional import linear

from liger_kernel.ops.glu.reference import glu


def gated_mlp(
    x: Tensor,
    gate_weight: Tensor,
    up_weight: Tensor | None,
    down_weight: Tensor,
    activation: str,
    gate_multiplier: float,
    limit: float | None = None,
    alpha: float = 1.0,
    product: Callable[..., Tensor] = glu,
) -> Tensor:
    """(f(gate_multiplier * x @ gate_weight.T) * (x @ up_weight.T)) @ down_weight.T, every product rounded as in eager.

    Without `up_weight`, `gate_weight` (2F, H) holds both: the gate in its first half, up in its second. `product` is
    what computes `f(gate) * up`.
    """
    up = None if up_weight is None else linear(x, up_weight)
    gated = product(linear(x, gate_weight), up, activation, gate_multiplier, 1.0, limit, alpha)
    return linear(gated, down_weight)
