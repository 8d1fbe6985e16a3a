"""Residual streams that are mixed by one op.

While a patched layer runs, its hyper-connections return `Coefficients`, which HF's own code casts and reshapes. It then
multiplies the layer's output by some and the streams by others: these two products wait, and their sum is one op.
Whatever else is done to coefficients or products is done to their numbers: slower, never wrong.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from liger_kernel.ops.mhc_mix import mhc_mix
from liger_kernel.transformers.patching.proof import of_ours
from liger_kernel.transformers.patching.waiting import Waiting, real

_plain = torch._C.DisableTorchFunctionSubclass


class _Running(threading.local):
    """Of the layer that runs in this thread."""

    connections: tuple[Any, ...] = ()  # children whose coefficients may wait
    mixed = 0  # how often streams were mixed by one op, for a proof


running = _Running()


def run(
    connections: tuple[Any, ...], forward: Callable[..., Any], *args: Any, **kwargs: Any
) -> Any:
    """`forward(*args, **kwargs)`, for whose `connections` sums wait."""
    before, running.connections = running.connections, connections
    try:
        return forward(*args, **kwargs)
    finally:
        running.connections = before


class Coefficients(Tensor):
    """Numbers as HF's code has made them by now, and `exact`, what they were made of; transposed, if these were."""

    exact: Tensor

    @classmethod
    def of(cls, numbers: Tensor, exact: Tensor) -> Tensor:
        if numbers.device != exact.device:
            return numbers
        found = numbers.as_subclass(cls)
        found.exact = exact
        return found

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        first, *more = args or (None,)
        if func in _PRODUCTS and len(more) == 1 and not kwargs and isinstance(first, cls):
            product = Product.of(first, more[0], func in _MATMULS)
            if product is not None:
                return product
        if any(isinstance(a, Waiting) for a in args):
            return func(*real(args), **(kwargs or {}))
        with _plain():
            found = func(*args, **(kwargs or {}))
            if not isinstance(first, cls) or func not in _STEPS:
                return found
            exact = first.exact
            return cls.of(found, exact.transpose(*more) if func is Tensor.transpose else exact)


class Product(Waiting):
    """`coefficients * other`, or the matrix product of the two."""

    def __init__(self, coefficients: Tensor, exact: Tensor, other: Tensor, of_streams: bool):
        self.coefficients, self.exact, self.other = coefficients, exact, other
        self.of_streams = of_streams
        self.raw = other.expand(*exact.shape[:3], other.shape[-1])

    @classmethod
    def of(cls, coefficients: Coefficients, other: Any, of_streams: bool) -> Product | None:
        """None where it is neither what a layer gives to the streams, nor what these give to each other."""
        exact, kept = coefficients.exact, coefficients.as_subclass(Tensor)
        if type(other) is not Tensor or (other.dtype, other.device) != (kept.dtype, kept.device):
            return None
        tokens, size = exact.shape[:2], exact.shape[2]
        shapes = [t.shape for t in (exact, kept)]
        wanted = (
            [(*tokens, size, size)] * 2 if of_streams else [(*tokens, size), (*tokens, size, 1)]
        )
        fit = shapes == wanted and other.shape[:-1] == (*tokens, size if of_streams else 1)
        return cls(kept, exact, other, of_streams) if fit else None

    def materialize(self) -> Tensor:
        product = torch.matmul if self.of_streams else torch.mul
        return product(self.coefficients, self.other)

    def __add__(self, other: Any) -> Any:
        given = {p.of_streams: p for p in (self, other) if isinstance(p, Product)}
        if len(given) < 2 or self.shape != other.shape or self.dtype != other.dtype:
            return self.materialize() + real(other)
        running.mixed += 1
        f, x = given[False], given[True]
        with of_ours():
            return mhc_mix(x.other, x.exact, f.other.squeeze(-2), f.exact)


_STEPS = (Tensor.to, Tensor.float, Tensor.unsqueeze, Tensor.transpose)
_MATMULS = (torch.matmul, Tensor.matmul, Tensor.__matmul__)
_PRODUCTS = (torch.mul, Tensor.mul, Tensor.__mul__, *_MATMULS)
