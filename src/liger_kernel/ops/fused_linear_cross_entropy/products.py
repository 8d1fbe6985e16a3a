"""The matrix products of a chunk: its logits, and of their gradient those of the hidden states and of the weight."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from liger_kernel._core.launch import cdiv


def slab_width(weight: Tensor) -> int:
    """Columns of a slab for the logits of `weight` (V, H): more than V where `Head` parts its classes for cuBLAS."""
    n_classes = weight.shape[0]
    whole = n_classes % 8 == 0 or not weight.is_cuda
    return n_classes if whole else cdiv(n_classes, 64) * 64


def has_mixed_gemm(x: Tensor) -> bool:
    """Whether a product of 16-bit matrices like x can be written, and added, unrounded to fp32."""
    return (
        x.dtype in (torch.bfloat16, torch.float16)
        and x.is_cuda
        and torch.version.hip is None
        and hasattr(torch.ops.aten.addmm, "dtype_out")
    )


@dataclass(frozen=True)
class Part:
    """Some classes of a head, and the columns of the slab that hold their logits, and perhaps padding."""

    classes: slice
    columns: slice
    weight: Tensor  # (columns, H)


class Head:
    """The products of a head (V, H) with rows of a slab (rows, width).

    Where V is no multiple of 8, as after a token was added to a vocabulary, cuBLAS takes kernels that load one element
    at a time: 174 instead of 38 ms for 8192x4096x128257 on an H100. So the last classes get products of their own, as
    eight with zeros for those that are missing, and rows of the slab start at multiples of 128 bytes. Not so with a
    bias: PyTorch adds it to padded rows after they were rounded, and the sum is rounded again.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, may_pad: bool):
        """`may_pad`: whether who computes the loss can walk padded rows."""
        n_classes = weight.shape[0]
        even = n_classes - n_classes % 8
        # the gradient of the hidden states is a sum over both parts, and must be rounded once, too
        sums_wide = weight.dtype.itemsize > 2 or has_mixed_gemm(weight)
        width = slab_width(weight)
        parted = width > n_classes and even > 0 and bias is None and sums_wide and may_pad
        self.bias = bias
        self.width = width if parted else n_classes
        if not parted:
            whole = slice(0, n_classes)
            self.parts = [Part(whole, whole, weight)]
            return
        main, last = slice(0, even), slice(even, n_classes)
        rest = weight.new_zeros(8, weight.shape[1])
        rest[: n_classes - even] = weight[last]
        self.parts = [Part(main, main, weight[main]), Part(last, slice(even, even + 8), rest)]

    def project(self, x: Tensor, rows: Tensor) -> None:
        """rows = x @ weight.T + bias"""
        for part in self.parts:
            if self.bias is None:
                torch.mm(x, part.weight.t(), out=rows[:, part.columns])
            else:
                torch.addmm(self.bias, x, part.weight.t(), out=rows)

    def back(self, rows: Tensor, dx: Tensor, where: slice | Tensor) -> None:
        """dx[where] = rows @ weight, rounded once; rows of zeros where they are padded"""
        main, *rest = self.parts
        if rest:
            product = self._sum(rows)
        elif isinstance(where, slice) and dx.dtype == rows.dtype:
            torch.mm(rows, main.weight, out=dx[where])
            return
        else:
            product = torch.mm(rows, main.weight)
        if isinstance(where, Tensor):
            dx.index_copy_(0, where, product.to(dx.dtype))
        else:
            dx[where] = product

    def _sum(self, rows: Tensor) -> Tensor:
        """rows @ weight, in fp32 if the rows are in 16 bits"""
        options: dict[str, Any] = {"out_dtype": torch.float32} if rows.dtype.itemsize == 2 else {}
        main, *rest = self.parts
        total = torch.mm(rows[:, main.columns], main.weight, **options)
        for part in rest:
            torch.addmm(total, rows[:, part.columns], part.weight, **options, out=total)
        return total


class WeightGradient:
    """dW (V, H) as a running sum over the chunks.

    A running sum in 16 bits is rounded once per chunk: with two chunks the error against float64 grows to 1.12 times
    that of one, with four to 1.32 times. So it is kept in fp32 from the third chunk on, unless the caller decides.
    """

    WIDENED = 4096  # classes whose logit gradients are converted at a time

    def __init__(self, weight: Tensor, n_chunks: int, accum_dtype: torch.dtype | None):
        wide = torch.promote_types(weight.dtype, torch.float32)
        dtype = accum_dtype or (weight.dtype if n_chunks <= 2 else wide)
        self.weight_dtype = weight.dtype
        self.total = torch.empty(weight.shape, dtype=dtype, device=weight.device)
        self.empty = True

    def add(self, head: Head, dlogits: Tensor, x: Tensor) -> None:
        """Add `dlogits.T @ x`, rounded to nothing but the dtype of the sum where the device can."""
        for part in head.parts:
            self._add(self.total[part.classes], dlogits[:, part.classes].t(), x)
        self.empty = False

    def _add(self, total: Tensor, rows: Tensor, x: Tensor) -> None:
        if total.dtype == x.dtype:
            self._gemm(total, rows, x)
        elif total.dtype == torch.float32 and has_mixed_gemm(x):
            self._gemm(total, rows, x, out_dtype=total.dtype)
        elif x.device.type == "cpu":  # 16-bit products are no faster here
            wide = x.to(total.dtype)
            for start in range(0, rows.shape[0], self.WIDENED):
                at = slice(start, start + self.WIDENED)
                self._gemm(total[at], rows[at].to(total.dtype), wide)
        elif self.empty:  # each product is rounded: 1.25 to 1.3 times the error of one chunk, however many there are
            total.copy_(torch.mm(rows, x))
        else:
            total.add_(torch.mm(rows, x))

    def _gemm(self, total: Tensor, rows: Tensor, x: Tensor, **options: Any) -> None:
        if self.empty:
            torch.mm(rows, x, **options, out=total)
        else:
            torch.addmm(total, rows, x, **options, out=total)

    def takes_large(self, dtype: torch.dtype) -> bool:
        """Whether sums of logit gradients in `dtype` cannot overflow on their way into the running sum."""
        x = torch.empty(0, dtype=dtype, device=self.total.device)
        wide = self.total.dtype == torch.float32
        return wide and (x.device.type == "cpu" or has_mixed_gemm(x))

    def result(self) -> Tensor:
        if self.empty:
            self.total.zero_()
        return self.total.to(self.weight_dtype)
