"""Rotary position embeddings in the call forms of HuggingFace's `apply_rotary_pos_emb`."""

from __future__ import annotations

from torch import Tensor

from liger_kernel.ops import rope as op
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
