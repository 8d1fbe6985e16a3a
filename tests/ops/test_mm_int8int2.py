"""Packed 2-bit weights beyond the cases, at the incumbent's path."""

from __future__ import annotations

import pytest
import torch
from liger_kernel.ops.experimental.mm_int8int2 import matmul, pack_weights, unpack_weights

from liger_kernel.ops.mm_int8int2 import mm_int8int2


def test_packing_and_back() -> None:
    """The argument stays as it was; whole and 8-bit integers, any further dimensions."""
    generator = torch.Generator().manual_seed(0)
    for shape, dtype in (((12, 5), torch.int32), ((8, 3, 2), torch.int8), ((0, 4), torch.int64)):
        weights = torch.randint(-1, 2, shape, generator=generator).to(dtype)
        before = weights.clone()
        packed = pack_weights(weights)
        assert torch.equal(weights, before)
        assert (packed.dtype, packed.shape) == (torch.uint8, (shape[0] // 4, *shape[1:]))
        assert torch.equal(unpack_weights(packed, bits=2), before.to(torch.int32))
    quarters = torch.tensor([[-1], [0], [1], [-1]])
    assert pack_weights(quarters).item() == 0b00_10_01_00


def test_the_product() -> None:
    generator = torch.Generator().manual_seed(0)
    weights = torch.randint(-1, 2, (40, 9), generator=generator)
    a = torch.randint(-128, 128, (7, 40), generator=generator)
    found = matmul(a.to(torch.int8), pack_weights(weights))
    assert found.dtype == torch.int32
    assert torch.equal(found.long(), a @ weights)


def test_more_terms_than_float32_can_add() -> None:
    terms = 2**17 + 4
    a = torch.full((1, terms), 127, dtype=torch.int8)
    weights = torch.ones(terms, 1, dtype=torch.int8)
    a[0, 0] = 126
    assert mm_int8int2(a, pack_weights(weights)).item() == 127 * terms - 1


def test_refused() -> None:
    a, b = torch.ones(3, 8, dtype=torch.int8), torch.ones(2, 5, dtype=torch.uint8)
    with pytest.raises(TypeError, match=r"a is torch\.float32 and b torch\.uint8"):
        mm_int8int2(a.float(), b)
    with pytest.raises(ValueError, match=r"a \(3, 8\) and b \(1, 5\) do not fit"):
        mm_int8int2(a, b[:1])
    with pytest.raises(ValueError, match=r"shape \(3, 8\); pad its rows to a multiple of 4"):
        pack_weights(a)
    with pytest.raises(ValueError, match="numbers from 0 to 2; 2 bits hold -1, 0 and 1"):
        pack_weights(torch.tensor([[0], [2], [1], [0]]))
    for function in (pack_weights, unpack_weights):
        with pytest.raises(ValueError, match="bits=4"):
            function(b, 4)
