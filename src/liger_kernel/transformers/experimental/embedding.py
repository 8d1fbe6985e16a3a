"""The embedding."""

from __future__ import annotations

from torch import Tensor, nn


class LigerEmbedding(nn.Embedding):
    """`nn.Embedding` that looks up zeros for `padding_idx`, whatever its row of the weight has become."""

    def __init__(self, num_embeddings: int, embedding_dim: int, padding_idx: int | None = None):
        super().__init__(num_embeddings, embedding_dim, padding_idx)

    def forward(self, indices: Tensor) -> Tensor:
        found = super().forward(indices)
        if self.padding_idx is None:
            return found
        return found.masked_fill((indices == self.padding_idx).unsqueeze(-1), 0)
