"""What is known about each row of logits, and the factor that keeps its gradient within float16."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

HEADROOM = 64.0  # a row of logit gradients sums to twice that: far from the largest float16, 65504


class RowOutputs:
    """Columns of numbers, one a row; a slice of them is a view, so that every chunk writes its own part."""

    #: of a row whose label is ignored, one a column; columns beyond hold 0
    ignored: ClassVar[tuple[float, ...]] = ()

    def __init__(self, *columns: Tensor | None):
        self.columns = columns

    @property
    def loss(self) -> Tensor:
        """What carries a gradient: (N,), or (N, K) with K numbers a row; fp32 or wider, already divided by the divisor
        if the reduction is "mean"."""
        loss = self.columns[0]
        assert loss is not None
        return loss

    def __getitem__(self, at: slice) -> Any:
        if at.stop - at.start == len(self.loss):
            return self
        return type(self)(*(None if column is None else column[at] for column in self.columns))

    def spread(self, at: Tensor, n_rows: int) -> Any:
        """These rows at the indices `at` among `n_rows`; the others have an ignored label."""
        ignored = (*self.ignored, *(0,) * len(self.columns))
        return type(self)(
            *(
                None
                if c is None
                else c.new_full((n_rows, *c.shape[1:]), value).index_copy_(0, at, c)
                for c, value in zip(self.columns, ignored, strict=False)
            )
        )


def gradient_scale(
    dtype: torch.dtype, divisor: Tensor | None, device: torch.device
) -> Tensor | None:
    """By what logit gradients are multiplied while `dtype` holds them; None for 1. `divisor`: that of a mean.

    Divided by the number of tokens, the gradients of unlikely classes fall below what float16 can hold, and a gradient
    scaler comes too late for them: it multiplies the loss that these gradients are already made of.
    """
    if dtype != torch.float16:
        return None
    if divisor is None:
        return torch.full((), HEADROOM, device=device)
    tokens = divisor.to(torch.float32)
    tokens = tokens.masked_fill(tokens <= 0, 1)
    return HEADROOM * tokens.log2().ceil().exp2()  # a power of 2: taking it back rounds nothing
