"""Rotary position embeddings in the call forms of HuggingFace's `apply_rotary_pos_emb`."""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType

import torch
from torch import Tensor

from liger_kernel.ops import rope as op
from liger_kernel.ops.rope import LigerLlama4RopeFunction as LigerLlama4RopeFunction
from liger_kernel.ops.rope import LigerQwen2VLMRopeFunction as LigerQwen2VLMRopeFunction
from liger_kernel.ops.rope import LigerRopeFunction as LigerRopeFunction


def liger_rotary_pos_emb(
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    position_ids: Tensor | None = None,
    unsqueeze_dim: int = 1,
    rotary_dim: int | None = None,
) -> tuple[Tensor, Tensor | None]:
    """`liger_kernel.ops.rope.rope` of q and k; `position_ids` is unused, as in HF: cos and sin already follow it."""
    if unsqueeze_dim == 0:  # Pixtral's cos and sin are (S, D), and the same for every row
        cos, sin, unsqueeze_dim = cos[None], sin[None], 1
    return op.rope(q, k, cos, sin, unsqueeze_dim, rotary_dim)


def liger_rotary_pos_emb_vision(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor
) -> tuple[Tensor, Tensor]:
    """The same for a vision tower's q and k, (S, H, D), with cos and sin (S, D); in the dtypes of q and k."""
    rotated = op.rope(q.unsqueeze(0), k.unsqueeze(0), cos, sin, unsqueeze_dim=2)
    return rotated[0].squeeze(0), rotated[1].squeeze(0)  # type: ignore[union-attr]  # k is given


def liger_rotary_pos_emb_gpt_oss(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor
) -> tuple[Tensor, Tensor | None]:
    """The same for GPT-OSS, whose cos and sin have one column per pair."""
    return op.rope(q, k, cos, sin, rotary_dim=q.shape[-1])


def liger_multimodal_rotary_pos_emb(
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    mrope_section: Sequence[int],
    unsqueeze_dim: int = 1,
) -> tuple[Tensor, Tensor | None]:
    """The same for Qwen2-VL, whose cos and sin, (3, B, S, D), are those of the positions in time, height and width.

    The first `mrope_section[0]` pairs turn by time, the next `[1]` by height, the others by width.
    """
    return op.rope(q, k, cos, sin, unsqueeze_dim, mrope_section=mrope_section)


def liger_llama4_text_rotary_pos_emb(
    xq: Tensor, xk: Tensor, freqs_cis: Tensor
) -> tuple[Tensor, Tensor]:
    """Llama 4's: heads (B, S, H, D) times complex `freqs_cis`, (S, D/2) or (1 or B, S, D/2)."""
    found: tuple[Tensor, Tensor] = LigerLlama4RopeFunction.apply(xq, xk, freqs_cis)
    return found


def liger_llama4_vision_rotary_pos_emb(
    query: Tensor, key: Tensor, freqs_ci: Tensor
) -> tuple[Tensor, Tensor]:
    """That of Llama 4's vision tower; `freqs_ci` has any axes of size 1 besides.

    Where a cast made it real, what is left of it is multiplied with both columns of a pair, as HF does.

    Raises: ValueError if `freqs_ci` has neither S * D/2 elements nor B times as many.
    """
    batch, seq, _, head_dim = query.shape
    shape = (batch if freqs_ci.numel() == batch * seq * head_dim // 2 else 1, seq, head_dim // 2)
    if freqs_ci.numel() != torch.Size(shape).numel():
        raise ValueError(
            f"Unexpected freqs_ci shape {tuple(freqs_ci.shape)} for query {tuple(query.shape)}: pass "
            f"({seq}, {head_dim // 2}) or ({batch}, {seq}, {head_dim // 2}), or that with axes of size 1."
        )
    freqs = freqs_ci.reshape(shape)
    if not freqs.is_complex():
        freqs = torch.complex(freqs.float(), torch.zeros_like(freqs, dtype=torch.float32))
    return liger_llama4_text_rotary_pos_emb(query, key, freqs)


def apply_liger_llama4_rope_full(modeling_module: ModuleType) -> None:
    """Puts both into a modeling file of Llama 4: every model of it in this process uses them.

    `liger_kernel.patch(model)` does it for one model.
    """
    modeling_module.apply_rotary_emb = liger_llama4_text_rotary_pos_emb  # type: ignore[attr-defined]
    modeling_module.vision_apply_rotary_emb = liger_llama4_vision_rotary_pos_emb  # type: ignore[attr-defined]
