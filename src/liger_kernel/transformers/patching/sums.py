"""Residual sums that wait for the norm after them.

A patched decoder layer gets its hidden states as a `Sum`. HF's own code adds to it, which is another `Sum`, and hands
it to norms, which compute sum and norm as one op; from then on it holds the sum, as that op returned it. So the two
gradients that a norm and a residual connection make of one tensor meet in the backward of the norm.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from liger_kernel.ops import fused_add_rms_norm as fused_op
from liger_kernel.transformers.patching.waiting import Waiting, real


class Sum(Waiting):
    """`raw + more`; raw alone, where there is no more."""

    def __init__(self, raw: Tensor, more: Tensor | None = None):
        self.raw, self.more = raw, more

    def materialize(self) -> Tensor:
        if self.more is not None:
            self.raw, self.more = self.raw + self.more, None
        return self.raw

    def normed(self, weight: Tensor | None, *options: Any) -> Tensor:
        """The RMSNorm of the sum."""
        y, self.raw = fused_op.fused_add_rms_norm(self.raw, self.more, weight, *options)
        self.more = None
        return y

    def __add__(self, other: Any) -> Any:
        x, other = self.materialize(), real(other)
        like = isinstance(other, Tensor) and (x.shape, x.dtype) == (other.shape, other.dtype)
        if like and type(other) is Tensor and x.device == other.device:
            return Sum(x, other)
        return x + other

    __radd__ = __add__

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func in _ADDITIONS and len(args) == 2 and not kwargs:
            one, other = args if isinstance(args[0], Sum) else args[::-1]
            return one + other
        return super().__torch_function__(func, types, args, kwargs)


_ADDITIONS = (torch.add, Tensor.add, Tensor.__add__, Tensor.__radd__)
