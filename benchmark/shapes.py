"""Sizes of everything that is measured beyond single ops (whose sizes are the `large` cases of their `cases.py`).

One more size is one more line.
"""

from __future__ import annotations

import math
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
    "qwen3-30b-a3b-6-layers": _model(
        "qwen3_moe", 151936, 2048, 6144, 6, 32, 4, head_dim=128, moe_intermediate_size=768,
        num_experts=128, num_experts_per_tok=8, norm_topk_prob=True,
    ),
    "gpt-oss-20b-4-layers": _model(
        "gpt_oss", 201088, 2880, 2880, 4, 64, 8, head_dim=64, num_local_experts=32,
        num_experts_per_tok=4, attn_implementation="eager",  # its sinks; no other comes with torch
    ),
    "mixtral-8x7b-2-layers": _model(
        "mixtral", 32000, 4096, 14336, 2, 32, 8, num_local_experts=8, num_experts_per_tok=2
    ),
    "tiny": _model("llama", 32000, 256, 688, 4, 4, 2),
}  # fmt: skip


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
    Setup("qwen3-30b-a3b-6-layers", 4096, 2),
    Setup("gpt-oss-20b-4-layers", 1024, 8),
    Setup("mixtral-8x7b-2-layers", 4096, 2),
    Setup("llama-3.1-8b", 4096, 2, rank=16),
    Setup("llama-3.1-8b", 512, 4, rank=16),
    Setup("qwen3-0.6b", 512, 4, rank=16),
    Setup("llama-3-8b-4-layers", 4096, 2, rank=16, head=True),
    Setup("llama-3-8b-4-layers", 4096, 2, rank=16, weights="nf4"),
    Setup("llama-3-8b-4-layers", 4096, 2, rank=16, weights="int8"),
)


class LossShape(NamedTuple):
    """A batch of `python -m benchmark losses`."""

    batch: int  # sequences
    length: int  # tokens of each
    hidden: int
    classes: int
    ignored: float = 0.0  # the share of each sequence that is its prompt

    @property
    def product(self) -> int:
        """Multiplications of a matrix product that leaves nothing out."""
        return math.prod(self[:4])


LOSSES = {
    "8x1024x4096x128256": LossShape(8, 1024, 4096, 128256),
    "8x1024x4096x128256-half-ignored": LossShape(8, 1024, 4096, 128256, ignored=0.5),
    "8x1024x4096x151936": LossShape(8, 1024, 4096, 151936),
    "2x32768x4096x128256": LossShape(2, 32768, 4096, 128256),
    "tiny": LossShape(4, 8, 16, 64),
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
        return replace(self, vocab=max(self.vocab // 64, 2000), hidden=64, batch=2, seq=96)


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


#: op -> name of the size and its inputs, of `python -m benchmark cpu`: megabytes, so that a call takes milliseconds.
#: Not `scale_gradients`, which writes in place: a call that leaves its inputs alone would measure their copies.
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
    "fused_linear_jsd": (
        "256x256x16000",
        lambda m: (
            *(t for _ in "st" for t in (m.randn(256, 256), m.randn(16000, 256, scale=1 / 16))),
            None,
        ),
    ),
    "fused_linear_kl_div": (
        "256x256x16000",
        lambda m: (
            *(m.randn(256, 256), m.randn(16000, 256, scale=1 / 16)),
            *(torch.softmax(m.randn(256, 16000), -1), None),
        ),
    ),
    "fused_ce_tvd": ("128x32000", lambda m: (*_pair(False)(m), m.labels(128, 32000))),
    "grpo_loss": (
        "256x32000",
        lambda m: (
            *(m.randn(256, 32000), m.labels(256, 32000)),
            *(m.randn(256, shift=-10).float(), m.randn(256, shift=-10).float()),
            *(m.randn(256).float(), None, None),
        ),
    ),
    "vocab_parallel_cross_entropy": (
        "256x32000",
        lambda m: (m.randn(256, 32000), m.labels(256, 32000)),
    ),
    "vocab_parallel_logprobs": (
        "256x32000",
        lambda m: (m.randn(256, 32000), m.labels(256, 32000), None),
    ),
    "qk_norm_rope": (
        "2x256, 16+4 heads of 64",
        lambda m: (
            *(m.randn(2, 256, n, 64).transpose(1, 2) for n in (16, 4)),
            *(m.randn(64), m.randn(64), m.randn(1, 256, 64), m.randn(1, 256, 64)),
        ),
    ),
    "tiled_mlp": (
        "2048x256x704",
        lambda m: (m.randn(2048, 256), *(m.randn(704, 256) for _ in "gu"), m.randn(256, 704)),
    ),
    "lora_linear": (
        "512x512x1408, rank 16",
        lambda m: (
            *(m.randn(512, 512), m.randn(1408, 512), None),
            *(m.randn(16, 512), m.randn(1408, 16)),
        ),
    ),
    "lora_mlp": (
        "512x256x704, rank 16",
        lambda m: (
            *(m.randn(512, 256), m.randn(704, 256), m.randn(704, 256), m.randn(256, 704)),
            *(m.randn(16, 256), m.randn(704, 16), m.randn(16, 256), m.randn(704, 16)),
            *(m.randn(16, 704), m.randn(256, 16)),
        ),
    ),
    "fused_moe": (
        "512x256, 2 of 16 experts of 256",
        lambda m: (
            *(m.randn(512, 256), m.randn(16, 512, 256), m.randn(16, 256, 256)),
            *(m.integers(16, 512, 2), m.randn(512, 2), *(None,) * 6),
        ),
    ),
    "moe_router": ("4096x128", lambda m: (m.randn(4096, 128), None)),
    "short_conv": ("2x512x1024", lambda m: (m.randn(2, 512, 3072), m.randn(1024, 3), None)),
    "attn_res": (
        "8x512x1024",
        lambda m: (m.randn(8, 512, 1024), m.randn(1024), m.randn(1024)),
    ),
    "mhc_mix": (
        "1024x4x512",
        lambda m: (
            *(m.randn(1024, 4, 512), m.randn(1024, 4, 4)),
            *(m.randn(1024, 512), m.randn(1024, 4)),
        ),
    ),
    "mhc_project": ("1024x2048x24", lambda m: (m.randn(1024, 2048), m.randn(2048, 24))),
    "mhc_sinkhorn": (
        "2048x24",
        lambda m: (m.randn(2048, 24), m.randn(24), m.randn(), m.randn(1), m.randn()),
    ),
    "multi_token_attention": (
        "8x256x256",
        lambda m: (m.randn(1, 8, 256, 256), m.randn(8, 8, 3, 3, scale=1 / 8), m.randn(8)),
    ),
    "fused_neighborhood_attention": (
        "8 heads of 64, 512 tokens",
        lambda m: tuple(m.randn(1, 8, 512, 64) for _ in "qkv"),
    ),
    "mm_int8int2": (
        "256x512x512",
        lambda m: (
            (m.integers(256, 256, 512) - 128).to(torch.int8),
            m.integers(256, 128, 512).to(torch.uint8),
        ),
    ),
    "dequantize_4bit": (
        "4096x4096",
        lambda m: (
            *(m.integers(256, 2**23).to(torch.uint8), m.randn(16)),
            *(
                m.integers(256, 2**18).to(torch.uint8),
                m.randn(256),
                m.randn(2**10).abs(),
                m.randn(),
            ),
        ),
    ),
}
