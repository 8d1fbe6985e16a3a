"""What gradient checkpointing keeps, the inputs of its layers, in pinned host memory until backward asks for it.

A stream of its own copies beside the layers, two of them at a time, and fetches the next one while a layer is computed
again. On devices without such streams, as on the CPU, nothing is moved.
"""

from __future__ import annotations

import sys
from collections import deque
from dataclasses import dataclass
from functools import cache
from typing import Any
from weakref import ref

import torch
from torch import Tensor, nn

from liger_kernel._core.autograd import has_numbers
from liger_kernel.backends import facts_of, is_capturing
from liger_kernel.transformers.patching.options import LONG, Option
from liger_kernel.transformers.patching.plans import MethodPlan
from liger_kernel.transformers.patching.site import Site, modules
from liger_kernel.transformers.patching.state import State

OFFLOAD = Option(
    "offload_checkpoints", False, "what gradient checkpointing keeps goes to pinned host memory."
)
#: bytes below which a tensor stays; bytes of a piece of host memory, a power of two, to which its allocator rounds;
#: copies that may be on their way to the host; and bytes up to which one is fetched ahead, since that takes
#: memory while a layer is at its peak. A copy of 1 GiB takes 20 ms, a layer of 8B on as many tokens 1.3 s.
_LEAST, _PIECE, _IN_FLIGHT, _AHEAD = 2**20, 2**26, 2, 2**30


@dataclass(frozen=True)
class OffloadPlan(MethodPlan):
    """HF's own forward, whose checkpoints go to the host."""

    kind = "checkpoints"

    def __str__(self) -> str:
        return "pinned host memory (while checkpointing is on, on a GPU)"

    @property
    def label(self) -> str:
        return "Offloaded"

    def call(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        forward = type(module).forward
        if not torch.is_grad_enabled() or not _is_checkpointed(module):
            return forward(module, *args, **kwargs)
        copies, embedding = Copies(), _embedding(module)
        hook = embedding and embedding.register_forward_hook(_anchored)
        try:
            with torch.autograd.graph.saved_tensors_hooks(copies.pack, _unpack):
                return forward(module, *args, **kwargs)
        finally:
            copies.close()
            if hook:
                hook.remove()


class _Anchor(torch.autograd.Function):
    """x, whose gradient goes nowhere."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, None]:
        return None, None


def _anchored(embedding: nn.Module, args: Any, output: Any) -> Any:
    """The output of a frozen embedding, of which HF makes a leaf that requires a gradient, for adapters in layers.

    A leaf is kept by its graph, on the device until backward ends, and then gets a gradient that nobody reads.
    """
    if isinstance(output, Tensor) and output.requires_grad and output.is_leaf:
        return _Anchor.apply(output.new_empty(0).requires_grad_(), output.detach())
    return output


def _embedding(module: Any) -> nn.Module | None:
    try:
        found = module.get_input_embeddings()
    except (AttributeError, NotImplementedError):
        return None
    return found if isinstance(found, nn.Module) else None


class Copies:
    """The checkpoints of one forward."""

    def __init__(self) -> None:
        self.in_flight: deque[Copy] = deque()
        self.last: Any = lambda: None

    def pack(self, x: Tensor) -> Any:
        """A `Copy` of what a checkpoint keeps, anything else as it is."""
        if not _of_checkpoint() or not _goes(x):
            return x
        copy = Copy(x, self.last)
        self.last = ref(copy)
        self.in_flight.append(copy)
        if len(self.in_flight) > _IN_FLIGHT:
            self.in_flight.popleft().arrive()
        return copy

    def close(self) -> None:
        """The last one stays on the device as well: backward begins with it."""
        last = self.in_flight.pop() if self.in_flight else None
        for copy in self.in_flight:
            copy.arrive()
        if last is not None:
            last.here = last.arrive(), None
        self.in_flight.clear()


class Copy:
    """A tensor on the host."""

    def __init__(self, x: Tensor, before: Any):
        self.before = before  # a weak reference to the copy that backward needs after this one
        self.like = x.new_empty(0), x.shape
        self.x: Tensor | None = x
        self.version = x._version
        self.here: tuple[Tensor, Any] | None = None  # on the device, and the event of its arrival
        flat = x.detach().view(-1).split(_PIECE // x.element_size())
        self.pieces = [_host_memory(piece) for piece in flat]
        self.stored = _beside(x.device, list(zip(self.pieces, flat, strict=True)))

    def arrive(self) -> Tensor:
        """Let what is queued from now on wait for the copy, so that the memory of x may be used again.

        Returns: x. Raises: RuntimeError if it was changed since.
        """
        x, self.x = self.x, None
        assert x is not None
        self._wait(x.device, self.stored)
        if x._version != self.version:
            raise RuntimeError(
                "What gradient checkpointing keeps was changed in place while it was copied to the host: a layer "
                "writes over its input. Patch the model without offload_checkpoints."
            )
        return x

    def fetch(self) -> None:
        """Bring it to the device beside what is computed."""
        empty, shape = self.like
        x = empty.new_empty(shape)
        flat = x.view(-1).split(_PIECE // x.element_size())
        self._wait(x.device, self.stored)
        self.here = x, _beside(x.device, list(zip(flat, self.pieces, strict=True)))

    def take(self) -> Tensor:
        """It, on the device; the next one is on its way then."""
        if self.here is None:
            self.fetch()
        x, event = self.here  # type: ignore[misc]
        self.here = None
        self._wait(x.device, event)
        before = self.before()
        if before is not None and before.arrived() and x.nbytes <= _AHEAD:
            before.fetch()
        return x

    def arrived(self) -> bool:
        """Whether it is on the host alone."""
        return self.x is None and self.here is None

    def _wait(self, device: torch.device, event: Any) -> None:
        if event is not None:
            _streams(device).current_stream(device).wait_event(event)

    def __del__(self) -> None:
        """Nobody uses the memory of a copy that is still under way."""
        x = self.__dict__.get("x")
        here = self.__dict__.get("here") or (None, None)
        for tensor, event in ((x, self.__dict__.get("stored")), here):
            if tensor is not None:
                self._wait(tensor.device, event)


def _unpack(packed: Any) -> Tensor:
    return packed.take() if isinstance(packed, Copy) else packed


def _of_checkpoint() -> bool:
    """Whether `pack` was called for what `torch.utils.checkpoint` keeps of a forward: the inputs of a function."""
    frame: Any = sys._getframe(2)
    while frame is not None and frame.f_globals.get("__name__") == "torch.autograd.function":
        frame = frame.f_back
    return frame is not None and frame.f_globals.get("__name__") == "torch.utils.checkpoint"


def _goes(x: Tensor) -> bool:
    """Dense memory of its own on a device with streams; a parameter stays where it is."""
    return (
        type(x) is Tensor
        and x.nbytes >= _LEAST
        and x.is_contiguous()
        and has_numbers(x)
        and _streams(x.device) is not None
        and not is_capturing(x.device)
    )


def _streams(device: torch.device) -> Any:
    return facts_of(device).streams


@cache
def _stream(device: torch.device) -> Any:
    return _streams(device).Stream(device)


def _host_memory(like: Tensor) -> Tensor:
    return torch.empty(like.shape, dtype=like.dtype, pin_memory=True)


def _beside(device: torch.device, pairs: list[tuple[Tensor, Tensor]]) -> Any:
    """Copy second to first, each after all that is queued now; returns the event of the end."""
    streams, stream = _streams(device), _stream(device)
    stream.wait_stream(streams.current_stream(device))
    with streams.stream(stream), torch.no_grad():
        for to, of in pairs:
            to.copy_(of, non_blocking=True)
        return stream.record_event()


def _is_checkpointed(module: nn.Module) -> bool:
    """By HF, or by a wrapper of torch around a layer."""
    layers = (m for child in module.children() if type(child) is nn.ModuleList for m in child)
    return any(
        getattr(m, "gradient_checkpointing", False) or "_checkpoint_wrapped_module" in m._modules
        for m in (module, *layers)
    )


def _is_candidate(module: nn.Module) -> bool:
    """Whoever calls a list of layers, and knows of gradient checkpointing."""
    return hasattr(module, "gradient_checkpointing") and any(
        isinstance(child, nn.ModuleList) for child in module.children()
    )


def _prove(module: nn.Module, state: State) -> OffloadPlan:
    return OffloadPlan()


SITE = Site(
    options=(OFFLOAD, LONG),
    kind=OffloadPlan.kind,
    candidates=modules(_is_candidate),
    prove=_prove,
)
