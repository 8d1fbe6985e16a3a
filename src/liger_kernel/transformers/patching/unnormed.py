"""Heads that are not normed yet.

While a patched attention module runs, its q and k norms return an `Unnormed` instead of a tensor. HF's own code then
splits and transposes the heads; these views are recorded. When they reach the rotary function, norm and rotation are
one op. Anything else that asks for numbers gets the normed heads: slower, never wrong. From then on they are tensors:
what is written into one of them is seen in those that are views of it.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from liger_kernel.backends import served_alike
from liger_kernel.transformers.patching.linears import is_hooked
from liger_kernel.transformers.patching.waiting import Waiting


class _Running(threading.local):
    """Of the attention module that runs in this thread."""

    norms: tuple[Any, ...] = ()  # children whose norm may wait
    #: in a proof: the norms that were fused with a rotation, each with whether the numbers were right
    fused: list[tuple[nn.Module, bool]] | None = None


running = _Running()


@dataclass(frozen=True)
class Norm:
    """`qk_norm_rope`'s options of a norm; equal for q and k."""

    eps: float
    offset: float
    casting_mode: str


class _Call:
    """One call of a norm of x, not carried out: `compute()` in the gradient mode of then."""

    def __init__(self, x: Tensor, compute: Callable[[], Tensor]):
        self._x, self._compute = x, compute
        self._then = self._now()
        self.normed: Tensor | None = None

    def _now(self) -> tuple[bool, int | None]:
        x = self._x
        return torch.is_grad_enabled(), None if x.is_inference() else x._version

    def may_wait(self) -> bool:
        """Whether the numbers are those of then, and nobody has them yet."""
        return self.normed is None and self._then == self._now()

    def made(self) -> Tensor:
        if self.normed is None:
            grad, version = self._then
            if version != self._now()[1]:
                raise RuntimeError(
                    "The input of a norm of q or k, which waits for its rotation, was overwritten before that. Norm "
                    "and rotate apart: liger_kernel.patch(model, rope=False)."
                )
            with torch.set_grad_enabled(grad):
                self.normed = self._compute()
        return self.normed


class Unnormed(Waiting):
    """`compute()`, the norm of x, after the views in `steps`, which made `raw` of x itself.

    `heads` is the dimension of raw that the heads have been split off to, where all of them are normed together.
    """

    def __init__(
        self,
        norm: Norm,
        module: nn.Module,
        weight: Tensor | None,
        x: Tensor,
        compute: Callable[[], Tensor],
    ):
        self.norm, self.module, self.weight, self.raw = norm, module, weight, x
        self._call = _Call(x, compute)
        self._steps: tuple[tuple[str, tuple[Any, ...]], ...] = ()
        self._real: Tensor | None = None
        self.heads: int | None = None

    def may_wait(self) -> bool:
        return self._call.may_wait()

    def materialize(self) -> Tensor:
        if self._real is None:
            found = self._call.made()
            for name, args in self._steps:
                found = getattr(found, name)(*args)
            self._real = found
        return self._real

    def _then(self, raw: Tensor, heads: int | None, name: str, *args: Any) -> Any:
        if not self.may_wait():
            return getattr(self.materialize(), name)(*args)
        after = copy.copy(self)
        after.raw, after.heads, after._steps = raw, heads, (*self._steps, (name, args))
        return after

    def transpose(self, dim0: int, dim1: int) -> Any:
        last = self.raw.ndim - 1
        dims = dim0 % (last + 1), dim1 % (last + 1)
        if last in dims:
            return self.materialize().transpose(dim0, dim1)
        heads = dims[1 - dims.index(self.heads)] if self.heads in dims else self.heads
        return self._then(self.raw.transpose(dim0, dim1), heads, "transpose", dim0, dim1)

    def _reshaped(self, name: str, *shape: Any) -> Any:
        raw, heads = getattr(self.raw, name)(*shape), None
        if raw.shape[-1] != self.raw.shape[-1]:
            heads = raw.ndim - 2
            split = self.weight is not None and raw.shape[:-2] == self.raw.shape[:-1]
        if self.heads is not None or (heads is not None and not split):
            return getattr(self.materialize(), name)(*shape)
        return self._then(raw, heads, name, *shape)

    def view(self, *shape: Any) -> Any:
        return self._reshaped("view", *shape)

    def reshape(self, *shape: Any) -> Any:
        return self._reshaped("reshape", *shape)


def may_wait(module: nn.Module, x: Any, weight: Any) -> bool:
    """Whether the norm that runs is that of heads which a rotary function is waiting for, and nobody has to see it.

    NPUs have kernels of norm and rotation alone.
    """
    return (
        any(module is norm for norm in running.norms)
        and type(x) is Tensor
        and type(weight) in (nn.Parameter, Tensor, type(None))
        and not is_hooked(module.__dict__)
        and served_alike(("qk_norm_rope", "rms_norm", "rope"), x.device.type)
    )


def run(norms: tuple[Any, ...], forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """`forward(*args, **kwargs)`, whose `norms` may wait."""
    before, running.norms = running.norms, norms
    try:
        return forward(*args, **kwargs)
    finally:
        running.norms = before
