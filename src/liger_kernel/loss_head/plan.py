"""How rows are cut into chunks, and how much memory that takes. The loop, the losses and the forecast read it."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from liger_kernel._core.shapes import cdiv
from liger_kernel.backends import facts_of
from liger_kernel.backends.products import has_mixed_product
from liger_kernel.backends.records import ChunkSizes
from liger_kernel.loss_head.groups import cut
from liger_kernel.loss_head.label_count import LabelCount
from liger_kernel.loss_head.products import slab_width


@dataclass(frozen=True)
class ChunkOptions:
    """How the work is done, which does not change its result.

    chunk_size: rows of a chunk. memory_budget: bytes of the logits of a chunk. accum_dtype: of the sum of dW.
    label_count: how many labels are not ignored, or more.
    """

    accum_dtype: torch.dtype | None = None
    chunk_size: int | None = None
    memory_budget: int | None = None
    label_count: LabelCount | int | None = None

    def __post_init__(self) -> None:
        if self.chunk_size is not None and self.memory_budget is not None:
            raise ValueError(
                f"chunk_size={self.chunk_size} and memory_budget={self.memory_budget} both decide the rows per chunk; "
                f"pass one."
            )
        for name in ("chunk_size", "memory_budget"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}={value} is below 1; pass None for the default.")
        if self.accum_dtype is not None and not self.accum_dtype.is_floating_point:
            raise TypeError(
                f"accum_dtype={self.accum_dtype} is no floating dtype; pass torch.float32."
            )


@dataclass(frozen=True)
class ChunkPlan:
    """The chunks of `n_rows` rows: `rows` at most in each, where no larger group of rows has to stay whole."""

    n_rows: int
    rows: int
    weight: Tensor  # (V, H): its shape, dtype and device are read
    dtype: torch.dtype  # of the logits and the matrix products
    options: ChunkOptions
    needs_dw: bool

    @classmethod
    def of(
        cls,
        n_rows: int,
        weight: Tensor,
        dtype: torch.dtype,
        options: ChunkOptions,
        needs_dw: bool,
        teacher: Tensor | None = None,
    ) -> ChunkPlan:
        """Rows per chunk, at least 1 and at most n_rows; `memory_budget` bounds the bytes of the slab, or both slabs.

        Where dW would otherwise need an fp32 sum (see `sum_dtype`), two large chunks are taken if that needs no more
        memory: 2.0 instead of 3.0 GiB for 8192x4096x128256. So memory never shrinks as the budget grows.
        """
        width = slab_width(weight) + (0 if teacher is None else slab_width(teacher))
        limits = (options.accum_dtype, options.chunk_size, options.memory_budget)
        kind = (weight.shape, weight.dtype, dtype)
        rows = _rows(n_rows, width, kind, needs_dw, limits, chunk_sizes(weight.device))
        return cls(n_rows, rows, weight, dtype, options, needs_dw)

    def chunks(self, group_sizes: Sequence[int] | None = None) -> list[slice]:
        return cut(self.n_rows, self.rows, group_sizes)

    def sum_dtype(self, n_chunks: int) -> torch.dtype:
        """Of the running sum of dW over the chunks.

        A sum in 16 bits is rounded once per chunk: with two chunks the error against float64 grows to 1.12 times that
        of one, with four to 1.32 times. So it is kept in fp32 from the third chunk on, unless the caller decides.
        """
        wide = torch.promote_types(self.weight.dtype, torch.float32)
        return self.options.accum_dtype or (self.weight.dtype if n_chunks <= 2 else wide)

    def peak_bytes(self) -> int:
        """The most that slab, sum of dW and its rounding hold at once."""
        slab = self.rows * slab_width(self.weight) * self.dtype.itemsize
        if not self.needs_dw:
            return slab
        elements = self.weight.numel()
        total = self.sum_dtype(cdiv(self.n_rows, self.rows))
        mixed = total == torch.float32 and has_mixed_product(self.weight.device, self.dtype)
        product = 0 if total == self.dtype or mixed else elements * self.dtype.itemsize
        rounded = 0 if total == self.weight.dtype else elements * self.weight.dtype.itemsize
        return elements * total.itemsize + max(slab + product, rounded)


def chunk_sizes(device: torch.device) -> ChunkSizes:
    return facts_of(device).chunks


def _within(budget: int, width: int, dtype: torch.dtype, sizes: ChunkSizes) -> int:
    row_bytes = width * dtype.itemsize
    if budget < row_bytes:
        raise ValueError(
            f"memory_budget={budget} bytes do not hold one row of logits, {row_bytes} bytes "
            f"({width} columns in {dtype}); allow more."
        )
    rows = budget // row_bytes
    return rows - rows % sizes.multiple if rows > sizes.multiple else rows


@functools.lru_cache(maxsize=256)
def _rows(
    n_rows: int,
    width: int,
    kind: tuple[torch.Size, torch.dtype, torch.dtype],
    needs_dw: bool,
    limits: tuple[torch.dtype | None, int | None, int | None],
    sizes: ChunkSizes,
) -> int:
    """`ChunkPlan.of`: kind: shape and dtype of the weight, dtype of the logits."""
    (_, hidden), weight_dtype, dtype = kind
    accum_dtype, chunk_size, memory_budget = limits
    if chunk_size is not None:
        return max(1, min(chunk_size, n_rows))
    sum_dtype = accum_dtype or torch.promote_types(weight_dtype, torch.float32)
    narrow_sum = needs_dw and sum_dtype.itemsize <= dtype.itemsize
    if memory_budget is not None:
        rows = _within(memory_budget, width, dtype, sizes)
    else:
        rows = _by_default(n_rows, width, kind[0].numel(), dtype, narrow_sum, sizes)
    half = cdiv(cdiv(n_rows, 2), sizes.multiple) * sizes.multiple
    rounded = needs_dw and accum_dtype is None and weight_dtype.itemsize == 2
    # in units of 2 V bytes: the sum costs H more in the loop, and 2 H when it is rounded and the slab is gone
    if rounded and rows < half <= max(hidden + rows, 2 * hidden):
        rows = half
    return max(1, min(rows, n_rows))


def _by_default(
    n_rows: int, width: int, n_weights: int, dtype: torch.dtype, narrow_sum: bool, sizes: ChunkSizes
) -> int:
    allowed, fewest = sizes.slab_bytes, sizes.fewest_rows
    if narrow_sum:
        fewest = min(fewest, sizes.fewest_rows_narrow_sum)
    if sizes.slab_per_weight is not None:
        allowed = min(allowed, int(sizes.slab_per_weight * n_weights * dtype.itemsize))
    rows = min(sizes.most_rows, max(fewest, allowed // max(1, width * dtype.itemsize)))
    rows = 1 << (rows.bit_length() - 1)
    # as many chunks, but no short one at the end, and two rather than one: they cost no more time
    two = n_rows >= 2 * min(fewest, sizes.fewest_rows_narrow_sum)
    chunks = max(cdiv(n_rows, rows), 2 if two else 1)
    return min(rows, cdiv(cdiv(n_rows, chunks), sizes.multiple) * sizes.multiple)
