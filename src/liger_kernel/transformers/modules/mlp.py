"""SwiGLU feed-forward blocks as one op, projections included, which keeps a third less memory for backward."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from liger_kernel.ops.gated_mlp import LigerMLPFunction
from liger_kernel.transformers.modules.swiglu import GatedMLP, check_hidden_act


class LigerMLP(GatedMLP):
    """`down_proj(silu(gate_proj(x)) * up_proj(x))` by `liger_kernel.ops.gated_mlp`, which reads the weights alone.

    ValueError unless `config.hidden_act` is silu, and for `config.mlp_bias`.
    """

    multipliers: tuple[float, float] = (1.0, 1.0)

    def __init__(self, config: Any):
        check_hidden_act(config)
        if getattr(config, "mlp_bias", False):
            raise ValueError(
                f"{type(self).__name__} does not support bias, but config.mlp_bias is {config.mlp_bias!r}; "
                f"use LigerSwiGLUMLP."
            )
        super().__init__(config)

    def forward(self, x: Tensor) -> Tensor:
        weights = (self.gate_proj.weight, self.up_proj.weight, self.down_proj.weight)
        return LigerMLPFunction.apply(x, *weights, *self.multipliers)


class LigerFalconH1MLP(LigerMLP):
    """`LigerMLP` with `(g, d) = config.mlp_multipliers`: `down_proj(silu(g * gate_proj(x)) * up_proj(x)) * d`."""

    def __init__(self, config: Any):
        super().__init__(config)
        gate, down = map(float, config.mlp_multipliers)
        self.multipliers = (gate, down)
