"""Heads that are not normed yet.

While a patched attention module runs, its q and k norms return an `Unnormed` instead of a tensor. HF's own code then
splits and transposes the heads; these views are recorded. When they reach the rotary function, norm and rotation are
one op. Anything else that asks for numbers gets the normed heads: slower, never wrong.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, NamedTuple

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


class Norm(NamedTuple):
    """`qk_norm_rope`'s options of a norm; equal for q and k."""

    eps: float
    offset: float
    casting_mode: str


class Unnormed(Waiting):
    """`compute(x)` after the views in `steps`, which made `raw` of x itself.

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
        self._compute = compute
        self._steps: tuple[tuple[str, tuple[Any, ...]], ...] = ()
        self.heads: int | None = None

    def materialize(self) -> Tensor:
        found = self._compute()
        for name, args in self._steps:
            found = getattr(found, name)(*args)
        return found

    def _then(self, raw: Tensor, heads: int | None, name: str, *args: Any) -> Unnormed:
        after = Unnormed(self.norm, self.module, self.weight, raw, self._compute)
        after.heads, after._steps = heads, (*self._steps, (name, args))
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
    """Whether nobody has to see what a norm returns that is among `running.norms`.

    NPUs have kernels of norm and rotation alone.
    """
    return (
        type(x) is Tensor
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
