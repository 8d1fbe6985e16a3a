"""The models that the demo can train: data, no code that knows a name."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Shape:
    """A randomly initialised HuggingFace model, and the run that suits it."""

    why: str
    model_type: str
    config: dict[str, Any]
    batch: int
    seq: int
    steps: int
    dtype: str
    learning_rate: float


SHAPES: dict[str, Shape] = {
    "tiny": Shape(
        why="two CPU cores; like at scale, the logits are by far the largest tensor",
        model_type="llama",
        config={
            "vocab_size": 32_000,
            "hidden_size": 256,
            "intermediate_size": 688,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "tie_word_embeddings": True,
        },
        batch=8,
        seq=512,
        steps=10,
        dtype="float32",
        learning_rate=2e-3,
    ),
    "llama-3.2-1b": Shape(
        why="full fine-tuning of a 1B model on one GPU; needs about 65 GB without the library",
        model_type="llama",
        config={
            "vocab_size": 128_256,
            "hidden_size": 2048,
            "intermediate_size": 8192,
            "num_hidden_layers": 16,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "tie_word_embeddings": True,
        },
        batch=8,
        seq=2048,
        steps=20,
        dtype="bfloat16",
        learning_rate=3e-4,
    ),
    "llama-3-8b-4layers": Shape(
        why="the width of an 8B model; four layers, so that optimizer states fit one GPU",
        model_type="llama",
        config={
            "vocab_size": 128_256,
            "hidden_size": 4096,
            "intermediate_size": 14_336,
            "num_hidden_layers": 4,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "tie_word_embeddings": False,
        },
        batch=4,
        seq=4096,
        steps=20,
        dtype="bfloat16",
        learning_rate=3e-4,
    ),
    "qwen3-0.6b": Shape(
        why="a small model with a large vocabulary, where the loss head takes most of the memory",
        model_type="qwen3",
        config={
            "vocab_size": 151_936,
            "hidden_size": 1024,
            "intermediate_size": 3072,
            "num_hidden_layers": 28,
            "num_attention_heads": 16,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "tie_word_embeddings": True,
        },
        batch=8,
        seq=2048,
        steps=20,
        dtype="bfloat16",
        learning_rate=3e-4,
    ),
}
