"""Tiny random models of the families, with settings under which a wrong loss cannot pass.

Soft caps are tight, norm weights are random, heads have odd sizes. One row per model type.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

VOCAB = 131
_COMMON: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "attn_implementation": "eager",
}
CONFIGS: dict[str, dict[str, Any]] = {
    "llama": {"mlp_bias": True, "tie_word_embeddings": False},
    "mistral": {"sliding_window": 8},
    "qwen2": {"tie_word_embeddings": True},
    "qwen3": {"head_dim": 16},
    "gemma": {"head_dim": 16},
    "gemma2": {"head_dim": 16, "final_logit_softcapping": 0.5, "sliding_window": 8},
    "gemma3_text": {"head_dim": 16, "final_logit_softcapping": 0.7, "sliding_window": 8},
    "phi3": {"partial_rotary_factor": 0.5},
}


def build(model_type: str, dtype: torch.dtype = torch.float32, **overrides: Any) -> nn.Module:
    """The same weights at every call."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        model_type, **{**_COMMON, **CONFIGS.get(model_type, {}), **overrides}
    )
    return randomize(AutoModelForCausalLM.from_config(config)).to(dtype)


def randomize(model: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, p in model.named_parameters():
            noise = torch.randn(p.shape, generator=generator)
            p.copy_(
                1 + 0.3 * noise
                if "norm" in name
                else noise * (0.3 if "head" in name or "embed" in name else 0.15)
            )
    return model


def batch(
    rows: int = 3, length: int = 11, ignored: float = 0.3, seed: int = 0
) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCAB, (rows, length), generator=generator)
    drop = torch.rand(rows, length, generator=generator) < ignored
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "labels": ids.masked_fill(drop, -100),
    }


MOE = {"num_local_experts": 4, "num_experts_per_tok": 2, "output_router_logits": False}
#: models with experts, and how the report calls them
MIXTURES: dict[str, tuple[dict[str, Any], str]] = {
    "mixtral": (MOE, "SwiGLU"),
    "qwen3_moe": (
        {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "head_dim": 16},
        "SwiGLU",
    ),
    "gpt_oss": ({**MOE, "head_dim": 16}, "SwiGLU, limit=7, alpha=1.702, up + 1"),
    "deepseek_v3": (
        {
            "n_routed_experts": 4,
            "num_key_value_heads": 4,
            "num_experts_per_tok": 2,
            "n_group": 1,
            "topk_group": 1,
            "moe_intermediate_size": 24,
            "first_k_dense_replace": 1,
            "kv_lora_rank": 16,
            "q_lora_rank": 16,
            "qk_rope_head_dim": 8,
            "qk_nope_head_dim": 8,
            "v_head_dim": 16,
        },
        "SwiGLU",
    ),
}


def mixture(
    name: str = "mixtral", dtype: torch.dtype = torch.float32, implementation: str = "grouped_mm"
) -> Any:
    pytest.importorskip("transformers.integrations.moe")
    model = build(name, dtype, **MIXTURES[name][0])
    model.set_experts_implementation(implementation)
    return model


class Experts(nn.Module):
    """Three experts, as HF writes them."""

    def __init__(self, hidden: int = 32, features: int = 20) -> None:
        super().__init__()
        self.act_fn: nn.Module = nn.SiLU()
        self.gate_up_proj = nn.Parameter(torch.randn(3, 2 * features, hidden) / hidden**0.5)
        self.down_proj = nn.Parameter(torch.randn(3, hidden, features) / features**0.5)

    def _apply_gate(self, gate_up: Tensor) -> Tensor:
        gate, up = gate_up.chunk(2, -1)
        return self.act_fn(gate) * up

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        out = torch.zeros_like(hidden_states)
        for expert in range(len(self.down_proj)):
            token, k = torch.where(top_k_index == expert)
            gated = self._apply_gate(hidden_states[token] @ self.gate_up_proj[expert].t())
            y = gated @ self.down_proj[expert].t() * top_k_weights[token, k, None]
            out.index_add_(0, token, y)
        return out
