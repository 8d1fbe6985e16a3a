"""Who computes an op: decided here, in one order for all of them.

0. What the user registered for the op, and chose by its name.
1. Under torch.compile the reference, which Inductor fuses with its neighbours. Kernels that were asked for by name run
   all the same, outside of the graph; `fullgraph=True` then raises. The reference, too, under every other transform
   that follows PyTorch's ops.
2. DTensors, by the op's rule for shards.
3. PyTorch's own C++ ops where the input is so small that the host is the bound.
4. The implementation for the tensor's device, or the one asked for by name (`liger_kernel.backends.kernels_of`).
5. Where there is none, or it leaves these options or tensors to the reference (`_core.contract.Partial`), PyTorch's own
   fused op if it has one, or the reference, compiled if that was asked for: directly, under PyTorch's autograd. Nothing
   is computed twice then; an autograd node of ours would run the reference again in backward. (It does for tensors
   without numbers: they stand for those of a GPU, whose memory is estimated, and keep for backward what kernels keep.)

An op of several matrix products (gated and tiled MLP, LoRA) has a node around them. It asks `is_chosen` for 0,
`is_composed` for 1 and 2, and `is_plain` for 5.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from liger_kernel._core.autograd import Op, Recompute, has_numbers, in_torch_func, is_transformed
from liger_kernel._core.dtensor import is_dtensor
from liger_kernel._core.lazy import compat_names
from liger_kernel.backends import (
    REFERENCE,
    host_bound,
    kernels_of,
    kernels_requested,
    reference_of,
    requested,
)
from liger_kernel.backends.capability import NAMES

#: op -> what the user chose: `call(options, *tensors)`, or NotImplemented
CHOSEN: dict[str, Callable[..., Any]] = {}


_PLAIN = (Tensor, torch.nn.Parameter, type(None))


@dataclass(frozen=True)
class Dispatch:
    """What an op declares; calling it computes the op: `dispatch(options, *tensors)`.

    name: of the op's folder. node: its autograd node. reference: `reference(*tensors, **options)`.
    shards: from a function of plain tensors, and the op's tensors of which some are DTensors, to its outputs.
    small: elements of the first tensor up to which `eager(options, *tensors)` is tried on a GPU; it returns None where
    it would not compute the same.
    native: `native(options, *tensors)`, the op as PyTorch has it, run where there are no kernels; None likewise.
    """

    name: str
    node: type[Op]
    reference: Callable[..., Any]
    shards: Callable[..., Any]
    small: int = 0
    eager: Callable[..., Any] | None = None
    native: Callable[..., Any] | None = None

    def __call__(self, options: Any, *tensors: Tensor | None) -> Any:
        if CHOSEN and is_chosen(self.name):
            found = CHOSEN[self.name](options, *tensors)
            if found is not NotImplemented:
                return found
        if is_transformed():
            if kernels_requested() and torch.compiler.is_compiling() and not in_torch_func():
                return _outside_the_graph(self, options, *tensors)
            return self.reference(*tensors, **options.named())
        return self.run(options, *tensors)

    def run(self, options: Any, *tensors: Tensor | None) -> Any:
        """The op in eager mode."""
        for tensor in tensors:
            if type(tensor) not in _PLAIN and is_dtensor(tensor):
                return self.shards(lambda *local: self.run(options, *local), *tensors)
        x: Any = tensors[0]
        if self.eager is not None and host_bound(x, self.small):
            found = self.eager(options, *tensors)
            if found is not None:
                return found
        kernels = kernels_for(self.name, options, *tensors)
        if not is_plain(kernels, x):
            return self.node.apply(kernels, options, *tensors)
        if self.native is not None and requested() != REFERENCE:
            found = self.native(options, *tensors)
            if found is not None:
                return found
        return kernels.function(*tensors, **options.named())


def kernels_for(op: str, options: Any, *tensors: Tensor | None) -> Any:
    """What computes `op` for these tensors, of which the first is one, with these options."""
    x: Any = tensors[0]
    found = kernels_of(op, x)
    unserved = getattr(found, "unserved", None)
    if unserved is None or unserved(*tensors, options=options) is None:
        return found
    return reference_of(op, x)


def is_chosen(op: str) -> bool:
    """Whether the user chose who computes `op`: an op of several products then calls it as the single op that it is."""
    return op in CHOSEN and requested() is None


def is_plain(kernels: Any, x: Tensor) -> bool:
    """Whether `kernels` compute by PyTorch's own operators, which best run under its autograd: see 5 above."""
    return isinstance(kernels, Recompute) and has_numbers(x)


def is_composed(*tensors: Tensor | None) -> bool:
    """Whether an op of several matrix products is left to PyTorch's products and our single ops: for who follows ops
    one by one, and for DTensors, each of which has rules of its own."""
    return is_transformed() or any(map(is_dtensor, tensors))


@torch.compiler.disable
def _outside_the_graph(dispatch: Dispatch, options: Any, *tensors: Tensor | None) -> Any:
    return dispatch.run(options, *tensors)


def no_shards(name: str, way_out: str) -> Callable[..., Any]:
    """The rule of an op that has none: a TypeError with the way out."""

    def refuse(run: Callable[..., Any], *tensors: Tensor | None) -> Any:
        raise TypeError(f"{name} takes no DTensors; {way_out}.")

    return refuse


__getattr__ = compat_names(__name__, (*NAMES, "dispatch"), "liger_kernel.compat.dispatch")
