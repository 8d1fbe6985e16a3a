"""Neighbourhood attention with its projections, and as a layer."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor, nn

from liger_kernel.ops import fused_neighborhood_attention as op


class LigerFusedNeighborhoodAttention(nn.Module):
    """Attention of each token to the `kernel_size` around it, see `liger_kernel.ops.fused_neighborhood_attention`.

    Raises: ValueError for a hidden size that heads do not divide, an even window, or one or a dilation below 1.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        kernel_size: int = 7,
        dilation: int = 1,
        bias: bool = True,
        dropout: float = 0.0,
        scale: float | None = None,
    ):
        super().__init__()
        if hidden_size % num_heads:
            raise ValueError(
                f"hidden_size ({hidden_size}) must be divisible by num_heads ({num_heads})"
            )
        if kernel_size <= 0:
            raise ValueError(f"kernel_size ({kernel_size}) must be positive")
        if kernel_size % 2 == 0:
            raise ValueError(f"kernel_size ({kernel_size}) must be odd")
        if dilation < 1:
            raise ValueError(f"dilation ({dilation}) must be positive")
        self.hidden_size = hidden_size
        self.num_heads = num_heads
        self.head_dim = hidden_size // num_heads
        self.kernel_size = kernel_size
        self.dilation = dilation
        self.scale = self.head_dim**-0.5 if scale is None else scale
        self.dropout_p = dropout
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (
            nn.Linear(hidden_size, hidden_size, bias=bias) for _ in range(4)
        )
        self.dropout = nn.Dropout(dropout) if dropout > 0 else None

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """(B, S, H) to (B, S, H); NotImplementedError for a mask."""
        if attention_mask is not None:
            raise NotImplementedError(
                "Attention mask is not yet supported in LigerFusedNeighborhoodAttention"
            )
        by_head = (-1, self.head_dim)
        query, key, value = (
            project(hidden_states).unflatten(-1, by_head).transpose(1, 2)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        sizes = (self.kernel_size, self.dilation, self.scale)
        found = op.fused_neighborhood_attention(query, key, value, *sizes)
        found = found.transpose(1, 2).flatten(-2)
        return self.out_proj(found if self.dropout is None else self.dropout(found))

    def extra_repr(self) -> str:
        return (
            f"hidden_size={self.hidden_size}, num_heads={self.num_heads}, head_dim={self.head_dim}, "
            f"kernel_size={self.kernel_size}, dilation={self.dilation}, scale={self.scale}, dropout={self.dropout_p}"
        )


class LigerFusedNeighborhoodAttentionLayer(nn.Module):
    """`x + dropout(attention(layer_norm(x)))`"""

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        kernel_size: int = 7,
        dilation: int = 1,
        bias: bool = True,
        dropout: float = 0.0,
        layer_norm_eps: float = 1e-5,
        scale: float | None = None,
    ):
        super().__init__()
        sizes = (hidden_size, num_heads, kernel_size, dilation, bias, dropout, scale)
        self.attention = LigerFusedNeighborhoodAttention(*sizes)
        self.layer_norm = nn.LayerNorm(hidden_size, eps=layer_norm_eps)
        self.dropout = nn.Dropout(dropout) if dropout > 0 else None

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        found = self.attention(self.layer_norm(hidden_states), attention_mask)
        return hidden_states + (found if self.dropout is None else self.dropout(found))


@dataclass
class LigerFusedNeighborhoodAttentionConfig:
    """The arguments of the layer."""

    hidden_size: int = 768
    num_heads: int = 12
    kernel_size: int = 7
    dilation: int = 1
    bias: bool = True
    dropout: float = 0.0
    layer_norm_eps: float = 1e-5
    scale: float | None = None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)
