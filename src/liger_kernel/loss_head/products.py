"""The matrix products of a chunk: its logits, and of their gradient those of the hidden states and of the weight."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from liger_kernel._core.autograd import is_transformed
from liger_kernel._core.checks import check_floating
from liger_kernel._core.shapes import cdiv
from liger_kernel.backends import can_look, facts_of
from liger_kernel.backends.products import ProductSum, has_mixed_product, is_widened

ROW_MULTIPLE = 64  # elements: rows of 16-bit numbers start at multiples of 128 bytes


class LowRank(NamedTuple):
    """Two thin matrices whose product is added to logits, as by LoRA."""

    rows: Tensor  # (N, r)
    columns: Tensor  # (V, r)


class HeadInputs(NamedTuple):
    """Hidden states and the linear layer that makes logits of them."""

    hidden: Tensor  # (N, H)
    weight: Tensor  # (V, H)
    bias: Tensor | None  # (V,)
    dtype: torch.dtype  # of the logits and the matrix products
    low_rank: LowRank | None = None

    def products(self) -> HeadProducts:
        return HeadProducts(self)

    def slab_like(self, weight: Tensor) -> Tensor | None:
        """A weight whose logits take the memory of the slab that these take beside those of `weight`."""
        return self.weight


class GivenRows(NamedTuple):
    """What a second model says of each row: logits or probabilities, of all classes or of those in `bias`.

    It has the fields of `HeadInputs`. Of the classes that `bias` does not name the logit is -inf.
    """

    hidden: Tensor  # (N, Vt), or (N, K) with ids
    weight: None = None
    bias: Tensor | None = None  # (N, K) ids of classes, each of them once
    dtype: None = None
    n_classes: int = 0  # where there are ids

    @staticmethod
    def of(
        rows: Tensor, ids: Tensor | None, target: Tensor, n_classes: int, ignore_index: int
    ) -> GivenRows:
        check_floating(teacher=rows)
        if rows.ndim != 2 or rows.shape[0] != target.shape[0]:
            raise ValueError(
                f"A teacher without a weight has shape {tuple(rows.shape)}, but there are {target.shape[0]} labels; "
                f"pass ({target.shape[0]}, V)."
            )
        if ids is not None and (ids.shape != rows.shape or ids.is_floating_point()):
            raise ValueError(
                f"A teacher without a weight has shape {tuple(rows.shape)}, and no bias: what stands there must be the "
                f"classes of its columns, integers of this shape, got {tuple(ids.shape)} of {ids.dtype}."
            )
        if ids is not None and not is_transformed() and can_look(ids):
            ordered = ids[target != ignore_index].sort(1).values
            if (ordered[:, 1:] == ordered[:, :-1]).any():
                raise ValueError(
                    "A row of the teacher names a class twice; pass each of its classes once."
                )
        return GivenRows(rows.detach(), None, ids, None, n_classes)

    def products(self) -> GivenRows:
        return self

    def slab_like(self, weight: Tensor) -> Tensor | None:
        return None if self.bias is None else weight

    def slab(self, n_rows: int) -> Tensor:
        if self.bias is None:
            return self.hidden[:0]
        return self.hidden.new_empty(n_rows, self.n_classes)

    def logits(self, where: slice | Tensor, slab: Tensor) -> Tensor:
        if self.bias is None:
            return self.hidden[where]
        return slab.fill_(-torch.inf).scatter_(1, self.bias[where].long(), self.hidden[where])


def rows_of(x: Tensor, where: slice | Tensor) -> Tensor:
    """`x[where]`, where a slice has a start and an end; a view of all rows would take the host 2 us."""
    if isinstance(where, slice) and where.stop - where.start == x.shape[0]:
        return x
    return x[where]


def slab_width(weight: Tensor) -> int:
    """Columns of a slab for the logits of `weight` (V, H): more than V where `HeadProducts` parts its classes."""
    n_classes = weight.shape[0]
    if n_classes % facts_of(weight.device).product_multiple == 0:
        return n_classes
    return cdiv(n_classes, ROW_MULTIPLE) * ROW_MULTIPLE


@dataclass(frozen=True)
class Part:
    """Some classes of a head, and the columns of the slab that hold their logits, and perhaps padding."""

    classes: slice
    columns: slice
    weight: Tensor  # (columns, H)


class HeadProducts:
    """The products of a head (V, H) with rows of a slab (rows, width).

    Where V is no multiple that the device's library is fast for, as after a token was added to a vocabulary, the last
    classes get products of their own, filled up with zeros, and rows of the slab start at multiples of ROW_MULTIPLE.
    Not so with a bias: PyTorch adds it to padded rows after they were rounded, and the sum is rounded again.
    """

    def __init__(self, inputs: HeadInputs):
        self.inputs = inputs
        weight = inputs.weight.to(inputs.dtype)
        bias = None if inputs.bias is None else inputs.bias.to(inputs.dtype)
        multiple = facts_of(weight.device).product_multiple
        n_classes = weight.shape[0]
        even = n_classes - n_classes % multiple
        # the gradient of the hidden states is a sum over both parts, and must be rounded once, too
        sums_wide = weight.dtype.itemsize > 2 or has_mixed_product(weight.device, weight.dtype)
        width = slab_width(weight)
        parted = width > n_classes and even > 0 and bias is None and sums_wide
        self.bias = bias
        self.width = width if parted else n_classes
        self.is_padded = parted
        if not parted:
            whole = slice(0, n_classes)
            self.parts = [Part(whole, whole, weight)]
            self.columns = self._low_columns()
            return
        main, last = slice(0, even), slice(even, n_classes)
        rest = weight.new_zeros(multiple, weight.shape[1])
        rest[: n_classes - even] = weight[last]
        self.parts = [
            Part(main, main, weight[main]),
            Part(last, slice(even, even + multiple), rest),
        ]
        self.columns = self._low_columns()

    def _low_columns(self) -> Tensor | None:
        """(columns in use, r), those of the low-rank addition, and zeros; None without one."""
        low = self.inputs.low_rank
        if low is None:
            return None
        used, n_classes = self.parts[-1].columns.stop, low.columns.shape[0]
        columns = low.columns.to(self.inputs.dtype)
        return columns if used == n_classes else F.pad(columns, (0, 0, 0, used - n_classes))

    def slab(self, n_rows: int) -> Tensor:
        """Uninitialised memory for the logits of `n_rows` rows."""
        return torch.empty(
            n_rows, self.width, dtype=self.inputs.dtype, device=self.inputs.hidden.device
        )

    def logits(self, where: slice | Tensor, slab: Tensor, x: Tensor | None = None) -> Tensor:
        """The logits of the rows `where` of the hidden states, which are x, in the memory of `slab`."""
        x = rows_of(self.inputs.hidden, where).to(self.inputs.dtype) if x is None else x
        self.project(x, slab)
        if self.columns is not None:  # what is padded with zeros stays so
            slab[:, : self.columns.shape[0]].addmm_(self.low_rows(where), self.columns.t())
        return slab[:, : self.inputs.weight.shape[0]] if self.is_padded else slab

    def project(self, x: Tensor, rows: Tensor) -> None:
        """rows = x @ weight.T + bias"""
        for part in self.parts:
            if self.bias is None:
                out = rows[:, part.columns] if self.is_padded else rows
                torch.mm(x, part.weight.t(), out=out)
            else:
                torch.addmm(self.bias, x, part.weight.t(), out=rows)

    def low_rows(self, where: slice | Tensor) -> Tensor:
        assert self.inputs.low_rank is not None
        return self.inputs.low_rank.rows[where].to(self.inputs.dtype)

    def back(self, rows: Tensor, dx: Tensor, where: slice | Tensor) -> None:
        """dx[where] = rows @ weight, rounded once; rows of zeros where they are padded"""
        main, *rest = self.parts
        if rest:
            product = self._sum(rows)
        elif isinstance(where, slice) and dx.dtype == rows.dtype:
            torch.mm(rows, main.weight, out=rows_of(dx, where))
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


class WeightGradient(ProductSum):
    """dW (V, H) as a running sum over the chunks, in the dtype that the plan says."""

    def add_chunk(self, head: HeadProducts, dlogits: Tensor, x: Tensor) -> None:
        """Add `dlogits.T @ x`."""
        if not head.is_padded:
            self.add(dlogits.t(), x)
            return
        for part in head.parts:
            self.add_to(self.total[part.classes], dlogits[:, part.classes].t(), x)
        self.empty = False

    def takes_large(self, dtype: torch.dtype) -> bool:
        """Whether sums of logit gradients in `dtype` cannot overflow on their way into the running sum."""
        device, wide = self.total.device, self.total.dtype == torch.float32
        return wide and (is_widened(device, dtype) or has_mixed_product(device, dtype))


class HeadGradients:
    """The gradients of a head's inputs that somebody needs, added up chunk by chunk."""

    def __init__(
        self, inputs: HeadInputs, needs: Sequence[bool], sum_dtype: torch.dtype, all_rows: bool
    ):
        """`all_rows`: whether every row of the hidden states gets its gradient from some chunk."""
        hidden, weight, self.bias, self.dtype, low = inputs
        needs_dx, needs_dw, needs_db, *needs_low = needs
        new = torch.empty_like if all_rows else torch.zeros_like
        self.low_rows, self.low_columns = None, None
        if low is not None and needs_low[0]:
            self.low_rows = new(low.rows, memory_format=torch.contiguous_format)
        if low is not None and needs_low[1]:
            wide = torch.promote_types(low.columns.dtype, torch.float32)
            self.low_columns = WeightGradient(low.columns, wide)
        self.has_low_rank = low is not None
        self.dx = new(hidden, memory_format=torch.contiguous_format) if needs_dx else None
        self.dw = WeightGradient(weight, sum_dtype) if needs_dw else None
        self.db = None
        if needs_db:
            wide = torch.promote_types(self.dtype, torch.float32)
            self.db = torch.zeros(weight.shape[0], dtype=wide, device=hidden.device)

    def add(self, head: HeadProducts, rows: Tensor, x: Tensor, where: slice | Tensor) -> None:
        """`rows`: the gradient of the logits of the rows `where`, whose hidden states are x."""
        if self.dx is not None:
            head.back(rows, self.dx, where)
        if self.dw is not None:
            self.dw.add_chunk(head, rows, x)
        if self.db is not None:
            n_classes = head.inputs.weight.shape[0]
            self.db.add_(rows[:, :n_classes].sum(0, dtype=self.db.dtype))
        if self.low_rows is not None and head.columns is not None:
            product = ProductSum(self.low_rows[where], self.low_rows.dtype)
            product.add(rows[:, : head.columns.shape[0]], head.columns)
            if isinstance(where, Tensor):
                self.low_rows.index_copy_(0, where, product.total)
            else:
                self.low_rows[where] = product.total
        if self.low_columns is not None:
            n_classes = head.inputs.weight.shape[0]
            self.low_columns.add(rows[:, :n_classes].t(), head.low_rows(where))

    @property
    def takes_large(self) -> bool:
        """Whether sums over rows do not overflow where the gradient of the logits is large."""
        sums = [total for total in (self.dw, self.low_columns) if total is not None]
        return all(total.takes_large(self.dtype) for total in sums)

    def results(self) -> tuple[Tensor | None, ...]:
        """In the dtypes of hidden states, weight and bias, and of the two low-rank matrices where there are some."""
        dw = None if self.dw is None else self.dw.result()
        db = None if self.db is None or self.bias is None else self.db.to(self.bias.dtype)
        if not self.has_low_rank:
            return self.dx, dw, db
        columns = None if self.low_columns is None else self.low_columns.result()
        return self.dx, dw, db, self.low_rows, columns
