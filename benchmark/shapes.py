"""Sizes of everything that is measured beyond single ops (whose sizes are the `large` cases of their `cases.py`).

One more size is one more line.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from liger_kernel.testing import Inputs, Make


def _model(
    model_type: str, vocabulary: int, hidden: int, intermediate: int, layers: int, heads: int, groups: int, **more: Any
) -> dict[str, Any]:  # fmt: skip
    return {
        "model_type": model_type,
        "vocab_size": vocabulary,
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": groups,
        "tie_word_embeddings": True,
        **more,
    }


#: name -> configuration of a HuggingFace model with random weights
MODELS = {
    "llama-3.2-1b": _model("llama", 128256, 2048, 8192, 16, 32, 8),
    "llama-3-8b-4-layers": _model(
        "llama", 128256, 4096, 14336, 4, 32, 8, tie_word_embeddings=False
    ),
    "llama-3.1-8b": _model("llama", 128256, 4096, 14336, 32, 32, 8, tie_word_embeddings=False),
    "qwen3-0.6b": _model("qwen3", 151936, 1024, 3072, 28, 16, 8, head_dim=128),
    "tiny": _model("llama", 32000, 256, 688, 4, 4, 2),
}


class Setup(NamedTuple):
    """A training step: a row of `python -m benchmark e2e`.

    rank: of LoRA on all linears; 0: everything is trained. head: LoRA is on the head as well. weights: "nf4" or "int8",
    as bitsandbytes keeps the frozen ones; "": in bf16.
    """

    shape: str
    seq: int
    batch: int
    checkpointing: bool = False
    rank: int = 0
    head: bool = False
    weights: str = ""


STEPS = (
    Setup("llama-3.2-1b", 2048, 8),
    Setup("llama-3.2-1b", 16384, 1),
    Setup("llama-3.2-1b", 32768, 1, checkpointing=True),
    Setup("llama-3-8b-4-layers", 4096, 4),
    Setup("qwen3-0.6b", 2048, 8),
    Setup("qwen3-0.6b", 512, 4),
    Setup("llama-3.1-8b", 4096, 2, rank=16),
    Setup("llama-3.1-8b", 512, 4, rank=16),
    Setup("qwen3-0.6b", 512, 4, rank=16),
    Setup("llama-3-8b-4-layers", 4096, 2, rank=16, head=True),
    Setup("llama-3-8b-4-layers", 4096, 2, rank=16, weights="nf4"),
    Setup("llama-3-8b-4-layers", 4096, 2, rank=16, weights="int8"),
)

#: name -> sequences, tokens of each, hidden size, classes, of `python -m benchmark losses`
LOSSES = {
    "8x1024x4096x128256": (8, 1024, 4096, 128256),
    "8x1024x4096x151936": (8, 1024, 4096, 151936),
    "tiny": (4, 8, 16, 64),
}


@dataclass(frozen=True)
class Saving:
    """A model of two layers, whose peak is its loss: a row of `python -m benchmark savings`."""

    name: str
    model_type: str
    vocab: int
    hidden: int
    batch: int
    seq: int
    dtype: str = "bfloat16"
    tied: bool = True
    frozen: str = ""  # "head" or "body"
    autocast: bool = False

    def tiny(self) -> Saving:
        """The same in small: fewer tokens, a vocabulary still far larger than everything else."""
        return replace(self, vocab=self.vocab // 64, hidden=64, batch=2, seq=96)


SAVINGS = (
    Saving("Llama-3.2-1B", "llama", 128256, 2048, batch=8, seq=1024),
    Saving("Qwen3-0.6B", "qwen3", 151936, 1024, batch=4, seq=4096),
    Saving("Llama-3-8B", "llama", 128256, 4096, batch=4, seq=4096, tied=False),
    Saving("Gemma-2-2B, soft cap", "gemma2", 256000, 2304, batch=2, seq=2048),
    Saving("Qwen2-7B, frozen head", "qwen2", 152064, 3584, batch=1, seq=8192, tied=False, frozen="head"),
    Saving("Llama-3-8B, frozen body", "llama", 128256, 4096, batch=2, seq=2048, tied=False, frozen="body"),
    Saving("TinyLlama, float32", "llama", 32000, 2048, batch=64, seq=256, dtype="float32", tied=False),
    Saving("Qwen2-0.5B, autocast", "qwen2", 151936, 896, batch=8, seq=1024, dtype="float32", autocast=True),
)  # fmt: skip


class DemoShape(NamedTuple):
    """The run of `make demo` that suits the model of the same name."""

    why: str
    batch: int
    seq: int
    steps: int
    dtype: str
    learning_rate: float


DEMO = {
    "tiny": DemoShape("for two CPU cores; logits are the largest tensor, as at scale", 8, 512, 10, "float32", 2e-3),
    "llama-3.2-1b": DemoShape("needs about 65 GB without the library", 8, 2048, 20, "bfloat16", 3e-4),
    "llama-3-8b-4-layers": DemoShape("an 8B model, cut to fit one GPU", 4, 4096, 20, "bfloat16", 3e-4),
    "qwen3-0.6b": DemoShape("the loss head takes most of the memory", 8, 2048, 20, "bfloat16", 3e-4),
}  # fmt: skip


def _pair(logs: bool) -> Callable[[Make], tuple[Tensor, ...]]:
    form = torch.log_softmax if logs else torch.softmax
    return lambda make: tuple(form(make.randn(128, 32000), -1) for _ in range(2))


#: op -> name of the size and its inputs, of `python -m benchmark cpu`: megabytes, so that a call takes milliseconds
ON_CPU: dict[str, tuple[str, Inputs]] = {
    "rms_norm": ("1024x2048", lambda m: (m.randn(1024, 2048), m.randn(2048))),
    "fused_add_rms_norm": (
        "1024x2048",
        lambda m: (m.randn(1024, 2048), m.randn(1024, 2048), m.randn(2048)),
    ),
    "layer_norm": ("1024x2048", lambda m: (m.randn(1024, 2048), m.randn(2048), m.randn(2048))),
    "group_norm": ("4x64x1024", lambda m: (m.randn(4, 64, 1024), m.randn(64), m.randn(64))),
    "modulated_rms_norm": (
        "2x512x2048",
        lambda m: (m.randn(2, 512, 2048), m.randn(2048), m.randn(2, 1, 2048), m.randn(2, 1, 2048)),
    ),
    "poly_norm": ("1024x2048", lambda m: (m.randn(1024, 2048), m.randn(3), m.randn(1))),
    "dyt": ("1024x2048", lambda m: (m.randn(1024, 2048), m.randn(1), m.randn(2048), m.randn(2048))),
    "softmax": ("1024x2048", lambda m: (m.randn(1024, 2048),)),
    "sparsemax": ("512x2048", lambda m: (m.randn(512, 2048),)),
    "glu": ("512x4096", lambda m: (m.randn(512, 4096), m.randn(512, 4096))),
    "relu_squared": ("512x4096", lambda m: (m.randn(512, 4096),)),
    "gated_mlp": (
        "512x512x1408",
        lambda m: (m.randn(512, 512), *(m.randn(1408, 512) for _ in "gu"), m.randn(512, 1408)),
    ),
    "rope": (
        "2x256, 16+4 heads of 64",
        lambda m: (
            *(m.randn(2, 256, n, 64).transpose(1, 2) for n in (16, 4)),
            *(m.randn(1, 256, 64) for _ in "cs"),
        ),
    ),
    "cross_entropy": ("256x32000", lambda m: (m.randn(256, 32000), m.labels(256, 32000))),
    "logprobs": ("256x32000", lambda m: (m.randn(256, 32000), m.labels(256, 32000), None)),
    "kl_div": ("128x32000", lambda m: (_pair(True)(m)[0], _pair(False)(m)[0])),
    "jsd": ("128x32000", _pair(True)),
    "tvd": ("128x32000", _pair(False)),
    "fused_linear_cross_entropy": (
        "512x256x16000",
        lambda m: (
            *(m.randn(512, 256), m.randn(16000, 256, scale=1 / 16), m.labels(512, 16000)),
            *(None, None),
        ),
    ),
    "linear_logprobs": (
        "512x256x16000",
        lambda m: (
            *(m.randn(512, 256), m.randn(16000, 256, scale=1 / 16), m.labels(512, 16000)),
            *(None, None),
        ),
    ),
}
