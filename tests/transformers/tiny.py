"""Tiny random models of the families, with settings under which a wrong loss cannot pass.

Soft caps are tight, norm weights are random, heads have odd sizes. One row per model type.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
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
