"""Sums of matrix products, as exact as the device can make them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from liger_kernel.backends import facts_of


def has_mixed_product(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether a product of matrices in `dtype` can be written, and added, unrounded to fp32."""
    return dtype in facts_of(device).mixed_products


def is_widened(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether a product of matrices in `dtype` is computed in fp32, for want of a mixed one.

    Always in float16: the gradients of unlikely classes are too small for it, and enlarged, their sums too large.
    """
    return dtype == torch.float16 or facts_of(device).wide_products_are_free


class ProductSum:
    """The gradient of `weight`, a sum of products of matrices, kept in `dtype` while it grows."""

    WIDENED = 4096  # rows that are converted at a time

    def __init__(self, weight: Tensor, dtype: torch.dtype):
        self.weight_dtype = weight.dtype
        self.total = torch.empty(weight.shape, dtype=dtype, device=weight.device)
        self.empty = True

    def add(self, rows: Tensor, x: Tensor) -> None:
        """Add `rows @ x`, rounded to nothing but the dtype of the sum where the device can."""
        self.add_to(self.total, rows, x)
        self.empty = False

    def add_to(self, total: Tensor, rows: Tensor, x: Tensor) -> None:
        """`add`, of a part of the sum: the caller says when the sum is no longer empty."""
        if total.dtype == x.dtype:
            self._gemm(total, rows, x)
        elif total.dtype == torch.float32 and has_mixed_product(x.device, x.dtype):
            self._gemm(total, rows, x, out_dtype=total.dtype)
        elif total.dtype == torch.float32 and is_widened(x.device, x.dtype):
            wide = x.to(total.dtype)
            for start in range(0, rows.shape[0], self.WIDENED):
                at = slice(start, start + self.WIDENED)
                self._gemm(total[at], rows[at].to(total.dtype), wide)
        elif self.empty:  # each product is rounded: 1.25 to 1.3 times the error of one chunk, however many there are
            total.copy_(torch.mm(rows, x))
        else:
            total.add_(torch.mm(rows, x))

    def add_whole(self, grad: Tensor) -> None:
        """Add what is a product already."""
        if self.empty:
            self.total.copy_(grad)
        else:
            self.total.add_(grad)
        self.empty = False

    def _gemm(self, total: Tensor, rows: Tensor, x: Tensor, **options: Any) -> None:
        if self.empty:
            torch.mm(rows, x, **options, out=total)
        else:
            torch.addmm(total, rows, x, **options, out=total)

    def result(self) -> Tensor:
        if self.empty:
            self.total.zero_()
        return self.total.to(self.weight_dtype)
