"""SwiGLU feed-forward blocks with the parameter names of the HuggingFace modules that they replace.

The `forward` of a class uses only its projections, so that it can be grafted onto an instance of a foreign class.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from liger_kernel.ops.fused_moe import LigerFusedMoEFunction
from liger_kernel.ops.glu import LigerFusedGateUpSiLUMulFunction, LigerSiLUMulFunction


def check_hidden_act(config: Any) -> None:
    activation = getattr(config, "hidden_activation", None) or config.hidden_act
    if activation not in ("silu", "swish"):
        raise ValueError(
            f"Activation function {activation!r} not supported: a SwiGLU block needs 'silu' or 'swish'."
        )


class GatedMLP(nn.Module):
    """The projections of a gated block: `gate_proj` and `up_proj` (H -> I), `down_proj` (I -> H).

    Reads `config.hidden_size`, `config.intermediate_size` (unless given) and, where there is one, `config.mlp_bias`.
    """

    def __init__(self, config: Any, intermediate_size: int | None = None):
        super().__init__()
        self.config = config
        self.hidden_size = config.hidden_size
        self.intermediate_size = (
            config.intermediate_size if intermediate_size is None else intermediate_size
        )
        bias = bool(getattr(config, "mlp_bias", False))
        self.gate_proj = nn.Linear(self.hidden_size, self.intermediate_size, bias=bias)
        self.up_proj = nn.Linear(self.hidden_size, self.intermediate_size, bias=bias)
        self.down_proj = nn.Linear(self.intermediate_size, self.hidden_size, bias=bias)


class LigerSwiGLUMLP(GatedMLP):
    """`down_proj(silu(gate_proj(x)) * up_proj(x))`; ValueError unless `config.hidden_act` is silu."""

    def __init__(self, config: Any, intermediate_size: int | None = None):
        check_hidden_act(config)
        super().__init__(config, intermediate_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(LigerSiLUMulFunction.apply(self.gate_proj(x), self.up_proj(x)))


class LigerQwen3MoeSwiGLUMLP(LigerSwiGLUMLP):
    """`LigerSwiGLUMLP` under the name that Qwen3-MoE is patched with."""


class LigerSwiGLUMLPForMuseGlimmer(LigerSwiGLUMLP):
    """`LigerSwiGLUMLP` of a config that may call its activation `hidden_activation`."""

    def __init__(self, config: Any):
        super().__init__(config)


class LigerHunyuanV1SwiGLUMLP(LigerSwiGLUMLP):
    """`LigerSwiGLUMLP` with the constructor of HunYuan-V1."""

    def __init__(self, config: Any, layer_idx: int | None = None, is_shared_mlp: bool = False):
        super().__init__(config)
        self.layer_idx = layer_idx


class LigerFalconH1SwiGLUMLP(LigerSwiGLUMLP):
    """`down_proj(silu(gate_proj(x) * g) * up_proj(x)) * d` with `(g, d) = config.mlp_multipliers`.

    As in HF, d also scales the bias of `down_proj`.
    """

    def __init__(self, config: Any):
        super().__init__(config)
        self.gate_multiplier, self.down_multiplier = map(float, config.mlp_multipliers)

    def forward(self, x: Tensor) -> Tensor:
        gated = LigerSiLUMulFunction.apply(self.gate_proj(x), self.up_proj(x), self.gate_multiplier)
        return self.down_proj(gated) * self.down_multiplier


class LigerBlockSparseTop2MLP(nn.Module):
    """An expert of Mixtral: `w2(silu(w1(x)) * w3(x))`, no biases."""

    def __init__(self, config: Any):
        check_hidden_act(config)
        super().__init__()
        self.ffn_dim = config.intermediate_size
        self.hidden_dim = config.hidden_size
        self.w1 = nn.Linear(self.hidden_dim, self.ffn_dim, bias=False)
        self.w2 = nn.Linear(self.ffn_dim, self.hidden_dim, bias=False)
        self.w3 = nn.Linear(self.hidden_dim, self.ffn_dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(LigerSiLUMulFunction.apply(self.w1(x), self.w3(x)))


class LigerPhi3SwiGLUMLP(nn.Module):
    """`down_proj(silu(gate) * up)` with gate and up from one projection `gate_up_proj` (H -> 2I), no biases."""

    def __init__(self, config: Any):
        check_hidden_act(config)
        super().__init__()
        self.config = config
        self.hidden_size = config.hidden_size
        self.intermediate_size = config.intermediate_size
        self.gate_up_proj = nn.Linear(self.hidden_size, 2 * self.intermediate_size, bias=False)
        self.down_proj = nn.Linear(self.intermediate_size, self.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(LigerFusedGateUpSiLUMulFunction.apply(self.gate_up_proj(x)))


class LigerExperts(nn.Module):
    """The experts of a mixture, behind its router: the weighted sum of K SwiGLU blocks of each token.

    Parameters, uninitialised as in HF: `gate_up_proj` (E, 2I, H), the gates first, and `down_proj` (E, H, I).
    """

    def __init__(self, config: Any):
        check_hidden_act(config)
        super().__init__()
        self.num_experts = getattr(config, "num_experts", None) or config.num_local_experts
        self.hidden_dim = config.hidden_size
        self.intermediate_dim = (
            getattr(config, "moe_intermediate_size", None) or config.intermediate_size
        )
        shapes = (
            (2 * self.intermediate_dim, self.hidden_dim),
            (self.hidden_dim, self.intermediate_dim),
        )
        self.gate_up_proj, self.down_proj = (
            nn.Parameter(torch.empty(self.num_experts, *shape)) for shape in shapes
        )

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        tokens = hidden_states.view(-1, self.hidden_dim)
        chosen = (t.view(tokens.shape[0], -1) for t in (top_k_index, top_k_weights))
        out: Tensor = LigerFusedMoEFunction.apply(
            tokens, self.gate_up_proj, self.down_proj, *chosen
        )
        return out.view(hidden_states.shape)
