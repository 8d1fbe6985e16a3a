"""The embedding of the incumbent."""

from __future__ import annotations

import liger_kernel.ops.experimental.embedding as functions
import torch
from torch import nn

from liger_kernel import ops
from liger_kernel.transformers.experimental.embedding import LigerEmbedding


def test_the_padding_is_zeros() -> None:
    torch.manual_seed(0)
    module = LigerEmbedding(6, 4, padding_idx=2)
    assert not module.weight[2].any()
    module.weight.data[2] = 7  # as from a checkpoint
    indices = torch.tensor([[2, 1], [5, 1]])
    found = module(indices)
    assert torch.equal(found[0, 0], torch.zeros(4))
    assert torch.equal(found[0, 1], module.weight[1])
    found.sum().backward()
    assert module.weight.grad.sum(1).tolist() == [0, 8, 0, 0, 0, 4]


def test_without_padding_it_is_that_of_pytorch() -> None:
    module = LigerEmbedding(6, 4)
    assert isinstance(module, nn.Embedding)
    indices = torch.tensor([3, 0, 3], dtype=torch.int32)
    assert torch.equal(module(indices), module.weight[indices.long()])
    assert functions.LigerEmbeddingFunction is ops.LigerEmbeddingFunction
    assert torch.equal(
        functions.LigerEmbeddingFunction.apply(module.weight, indices), module(indices)
    )
