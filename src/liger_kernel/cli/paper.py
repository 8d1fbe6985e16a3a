"""A training step on the meta device: the bytes that would be in use, in no time and no memory.

Every op of PyTorch and every launcher of ours allocates what it would allocate, kernels are not started, and attention
takes and keeps what fused kernels do.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from liger_kernel.cli import models
from liger_kernel.transformers.patching.sites import checkpoints


class LiveBytes(TorchDispatchMode):
    """The most bytes at once in tensors made inside the block: a peak that no allocator rounds, on any device."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.live = self.peak = 0
        self.known = {p.untyped_storage()._cdata for p in model.parameters()}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor):
                self._count(leaf.untyped_storage())
        return out

    def _count(self, storage: torch.UntypedStorage) -> None:
        if storage._cdata not in self.known:
            self.known.add(storage._cdata)
            self.live += storage.nbytes()
            self.peak = max(self.peak, self.live)
            weakref.finalize(storage, self._free, storage._cdata, storage.nbytes())

    def _free(self, key: int, nbytes: int) -> None:
        self.known.discard(key)
        self.live -= nbytes


def step(model: Any, batch: int, seq: int) -> tuple[int, int]:
    """(what a forward keeps, the most bytes at once in forward, loss and backward), beside the weights."""
    given = models.inputs(model, batch, seq)
    labels = given.get("decoder_input_ids", given["input_ids"])
    with contextlib.ExitStack() as stack:
        stack.enter_context(models.runnable())
        sdpa = "scaled_dot_product_attention"
        stack.enter_context(mock.patch.object(nn.functional, sdpa, _attention))
        if hasattr(
            torch.ops.aten, "_fused_rms_norm"
        ):  # since torch 2.8; before, a GPU runs the same chain of ops
            stack.enter_context(mock.patch.object(torch, "rms_norm", _rms_norm))
        stack.enter_context(_checkpoints_on_the_host())
        with LiveBytes(model) as live:
            outputs = model(**given)
            kept = live.live - outputs[0].untyped_storage().nbytes()
        del outputs
        with LiveBytes(model) as live:
            model(**given, labels=labels).loss.backward()
    model.zero_grad(set_to_none=True)
    return kept, live.peak


class _FusedAttention(torch.autograd.Function):
    """Takes and keeps what flash attention takes and keeps; computes nothing."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        batch, heads, length, _ = q.shape
        out = q.new_empty(batch, length, heads, v.shape[-1]).transpose(1, 2)  # its layout
        ctx.save_for_backward(q, k, v, out, q.new_empty(q.shape[:-1], dtype=torch.float32))
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, *_ = ctx.saved_tensors
        total = q.new_empty(q.shape, dtype=torch.float32)  # of dq
        of_heads = [t.new_empty(q.shape) for t in (k, v) if t.shape[1] != q.shape[1]]
        found = [t.new_empty(t.shape) for t in (q, k, v)]
        del total, of_heads
        return tuple(found)


def _attention(query: Tensor, key: Tensor, value: Tensor, *args: Any, **options: Any) -> Any:
    return _FusedAttention.apply(query, key, value)


class _FusedRMSNorm(torch.autograd.Function):
    """Keeps what `torch.rms_norm` keeps on a GPU; on the meta device it is a chain of ops, two of them in fp32."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight, x.new_empty(x.shape[:-1], dtype=torch.float32))
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, _ = ctx.saved_tensors
        return torch.empty_like(x), None if weight is None else torch.empty_like(weight)


def _rms_norm(x: Tensor, shape: Any, weight: Tensor | None = None, eps: Any = None) -> Any:
    return _FusedRMSNorm.apply(x, weight)


class _Copy:
    """A checkpoint on the host, of which nothing is left on the device."""

    def __init__(self, x: Tensor, before: Any):
        self.like, self.shape = x.new_empty(0), x.shape
        self.x: Tensor | None = x
        self.here: tuple[Tensor, Any] | None = None

    def arrive(self) -> Tensor:
        x, self.x = self.x, None
        assert x is not None
        return x

    def take(self) -> Tensor:
        here, self.here = self.here, None
        return self.like.new_empty(self.shape) if here is None else here[0]


@contextlib.contextmanager
def _checkpoints_on_the_host() -> Iterator[None]:
    """What a patched model offloads takes no memory."""
    with (
        mock.patch.object(checkpoints, "Copy", _Copy),
        mock.patch.object(checkpoints, "_goes", lambda x: x.nbytes >= checkpoints._LEAST),
    ):
        yield
