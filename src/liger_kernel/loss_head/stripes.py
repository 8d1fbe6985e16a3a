"""Log-probabilities with the logits made once: all of them stay for backward, in stripes of classes.

Their memory is that of the gradient of the weight (V, H), which backward holds anyway, and as much for half of the
classes as two chunks of rows take. Each stripe becomes its own gradient in place; then the gradient of the weight is
written, stripe by stripe, where the logits of the stripes before have been.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from liger_kernel._core.rows import RowOutputs
from liger_kernel._core.shapes import cdiv
from liger_kernel.backends import facts_of, kernels_of
from liger_kernel.backends.products import ProductSum
from liger_kernel.loss_head.losses.logprobs import LogProbsLoss
from liger_kernel.loss_head.plan import ChunkPlan
from liger_kernel.loss_head.products import ROW_MULTIPLE, HeadInputs, HeadProducts
from liger_kernel.loss_head.row_loss import RowLoss
from liger_kernel.ops.cross_entropy.portable import of_all_classes
from liger_kernel.ops.logprobs.contract import LogProbRows
from liger_kernel.ops.logprobs.portable import factors_of, write_numbers

#: no stripe but the last before `half` is a smaller part of the classes
SMALLEST = 32
#: rows of the gradient of the hidden states that are summed at a time
SUMMED = 2048


class Stripe(NamedTuple):
    first: int  # class
    head: HeadProducts  # of these classes
    rows: Tensor  # (N, columns), the logits, and perhaps padding

    @property
    def logits(self) -> Tensor:
        return self.rows[:, : self.head.inputs.weight.shape[0]]


@dataclass
class Layout:
    """Where the logits of `n_rows` rows lie. Those of the classes before `half` end with the memory of dW (V, H).

    bounds: of the stripes before `half`. What a stripe gives to dW ends where its own logits start, or before, but for
    the first stripes where there are nearly twice as many rows as the hidden states are wide.
    """

    n_rows: int
    n_classes: int
    hidden: int
    multiple: int  # of the classes of a stripe

    def __post_init__(self) -> None:
        self.half = self.n_classes // 2 // self.multiple * self.multiple
        least = max(1, cdiv(self.n_classes, SMALLEST * self.multiple)) * self.multiple
        self.bounds = [0]
        while (first := self.bounds[-1]) < self.half:
            free = max(least, self.start(first) // self.hidden - first)
            if free < self.half - first:  # kernels walk over rows in blocks that are powers of 2
                free = self.multiple << (free // self.multiple).bit_length() - 1
            self.bounds.append(min(self.half, first + free))

    def start(self, first: int) -> int:
        """Of the logits of the stripe with this first class, before `half`, in elements."""
        return self.n_classes * self.hidden - (self.half - first) * self.n_rows


class Stripes:
    """What a forward keeps for its backward."""

    def __init__(self, loss: LogProbsLoss, layout: Layout):
        self.loss, self.layout = loss, layout
        #: that of dW, and the logits from `half` on; None once a backward has used them
        self.memory: tuple[Tensor, Tensor] | None = None
        self.said: Tensor | None = None  # (7, N), statistics over all classes

    @classmethod
    def of(cls, loss: RowLoss, inputs: HeadInputs, plan: ChunkPlan) -> Stripes | None:
        """None where all logits would take more memory than the chunks of `plan` and dW, and where the caller decides
        about chunks; one chunk is made once anyway."""
        hidden, weight, _, dtype, low_rank = inputs
        n_classes, width = weight.shape
        if type(loss) is not LogProbsLoss or loss.top_k or low_rank is not None:
            return None
        if not plan.needs_dw or not hidden.dtype == weight.dtype == dtype:
            return None
        decided = plan.options.chunk_size or plan.options.memory_budget
        if decided or plan.n_rows > 2 * width or len(plan.chunks()) < 2:
            return None
        multiple = ROW_MULTIPLE
        if n_classes < SMALLEST * multiple:
            multiple = facts_of(weight.device).product_multiple
        return cls(loss, Layout(plan.n_rows, n_classes, width, multiple))

    def _stripes(self, inputs: HeadInputs) -> list[Stripe]:
        """Their memory is what an earlier call found, or new."""
        x, weight, bias, dtype, _ = inputs
        layout = self.layout
        bounds = [*layout.bounds, layout.n_classes]
        heads = []
        for at in map(slice, bounds[:-1], bounds[1:]):
            of_bias = None if bias is None else bias[at]
            heads.append(HeadProducts(HeadInputs(x, weight[at], of_bias, dtype)))
        if self.memory is None:
            self.memory = weight.new_empty(weight.shape), heads[-1].slab(layout.n_rows)
        of_dw, of_rest = self.memory
        found = []
        for first, head in zip(layout.bounds, heads, strict=True):
            size = layout.n_rows * head.width
            here = of_dw.view(-1)[layout.start(first) :][:size].view(-1, head.width)
            found.append(Stripe(first, head, here if first < layout.half else of_rest))
        return found

    def forward(
        self, inputs: HeadInputs, ids: Tensor, temperatures: Tensor | None, out: RowOutputs
    ) -> None:
        """Write the numbers of all rows to `out`, and keep what backward needs."""
        assert isinstance(out, LogProbRows)
        stripes = self._stripes(inputs)
        wide = torch.promote_types(inputs.dtype, torch.float32)
        parts = inputs.hidden.new_empty(len(stripes), 7, self.layout.n_rows, dtype=wide)
        for part, stripe in zip(parts, stripes, strict=True):
            stripe.head.project(inputs.hidden, stripe.rows)
            kernels_of("logprobs", stripe.rows).statistics(
                stripe.logits, ids, temperatures, first=stripe.first, options=self.loss, out=part,
                padded=stripe.head.is_padded,
            )  # fmt: skip
        self.said = of_all_classes(parts)
        write_numbers(self.said, ids, self.layout.n_classes, options=self.loss, out=out)

    def backward(
        self,
        inputs: HeadInputs,
        ids: Tensor,
        temperatures: Tensor | None,
        row_scale: Tensor,
        needs: Sequence[bool],
    ) -> tuple[Tensor | None, ...]:
        """The gradients of hidden states, weight and bias. A second call makes the logits again."""
        x, _, bias, dtype, _ = inputs
        if self.memory is None:
            wide = torch.promote_types(dtype, torch.float32)
            self.forward(inputs, ids, temperatures, LogProbRows.empty(ids, wide, self.loss))
        stripes = self._stripes(inputs)
        assert self.memory is not None
        assert self.said is not None
        n_classes, dw = self.layout.n_classes, self.memory[0]
        factors = factors_of(self.said, ids, n_classes, row_scale, options=self.loss)
        of_classes = []
        for stripe in stripes:
            kernels_of("logprobs", stripe.rows).gradient(
                stripe.logits, ids, temperatures, factors, first=stripe.first, options=self.loss,
                grad=stripe.logits, padded=stripe.head.is_padded,
            )  # fmt: skip
            if bias is not None and needs[2]:
                of_classes.append(stripe.logits.sum(0, dtype=factors.dtype))
        db = None if bias is None or not of_classes else torch.cat(of_classes).to(bias.dtype)
        dx = _of_hidden(x, stripes) if needs[0] else None
        for stripe in stripes:
            self._of_weight(dw, stripe, x)
        self.memory = None
        return dx, dw, db

    def _of_weight(self, dw: Tensor, stripe: Stripe, x: Tensor) -> None:
        for part in stripe.head.parts:
            first, stop = (stripe.first + n for n in (part.classes.start, part.classes.stop))
            grad = stripe.rows[:, part.classes].t()
            is_apart = first >= self.layout.half
            if is_apart or stop * self.layout.hidden <= self.layout.start(first):
                torch.mm(grad, x, out=dw[first:stop])
            else:
                dw[first:stop] = torch.mm(grad, x)


def _of_hidden(x: Tensor, stripes: Sequence[Stripe]) -> Tensor:
    dx = torch.empty_like(x, memory_format=torch.contiguous_format)
    for start in range(0, len(x), SUMMED):
        at = slice(start, start + SUMMED)
        total = ProductSum(dx[at], torch.promote_types(x.dtype, torch.float32))
        for stripe in stripes:
            for part in stripe.head.parts:
                total.add(stripe.rows[at, part.columns], part.weight)
        dx[at] = total.total
        del total  # before the next one is made
    return dx
