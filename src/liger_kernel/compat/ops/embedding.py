"""The embedding as an autograd Function. PyTorch's own sorts the indices to add up gradients, without atomics."""

from __future__ import annotations

import torch.nn.functional as F

from liger_kernel.compat.function import autograd_function


def _embedding(embeddings, indices):
    return F.embedding(indices, embeddings)


LigerEmbeddingFunction = autograd_function("LigerEmbeddingFunction", _embedding)
