"""GEGLU feed-forward blocks (tanh approximation) of the Gemma family."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from liger_kernel.ops.glu import LigerGELUMulFunction
from liger_kernel.transformers.modules.swiglu import GatedMLP


class LigerGEGLUMLP(GatedMLP):
    """`down_proj(gelu_tanh(gate_proj(x)) * up_proj(x))`, whatever activation the config names."""

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(LigerGELUMulFunction.apply(self.gate_proj(x), self.up_proj(x)))


class LigerGEGLUMLPForGemma4(LigerGEGLUMLP):
    """`LigerGEGLUMLP`, twice as wide in layers that share keys and values if the config says so."""

    def __init__(self, config: Any, layer_idx: int | None = None):
        double = (
            layer_idx is not None
            and getattr(config, "use_double_wide_mlp", False)
            and layer_idx >= config.num_hidden_layers - config.num_kv_shared_layers > 0
        )
        super().__init__(config, config.intermediate_size * (2 if double else 1))
