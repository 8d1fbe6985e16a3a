"""A function of tensors and its backward as two graphs of a device's work, which the host starts by one call each."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from liger_kernel.backends import facts_of, host_is_free


def has_graphs(device: torch.device) -> bool:
    return facts_of(device).graphs is not None


def are_here() -> bool:
    """Whether a device of this machine has graphs."""
    device = torch.accelerator.current_accelerator()
    return device is not None and has_graphs(device)


@cache
def _stream(device: torch.device) -> Any:
    """On which all is captured: cuBLAS keeps a workspace for each."""
    return facts_of(device).graphs.Stream(device)  # type: ignore[union-attr]


def new_pool(device: torch.device) -> Any:
    """Memory for graphs of which at most one is under way at a time, from its forward to the end of its backward."""
    return facts_of(device).graphs.graph_pool_handle()  # type: ignore[union-attr]


#: why nothing more is captured in this process
failed: str | None = None


@contextlib.contextmanager
def _mended(device: torch.device, pool: Any) -> Iterator[None]:
    """Where a capture breaks off, torch leaves its stream current, its pool open and its generator waiting.

    A generator of the same numbers takes the place of that one. Graphs of before would draw from the other: there are
    none that go on, see `failed`.
    """
    global failed
    runtime: Any = facts_of(device).graphs
    now = runtime.current_stream(device)
    try:
        yield
    except BaseException as error:
        runtime.set_stream(now)
        with contextlib.suppress(RuntimeError):
            torch._C._cuda_endAllocateToPool(device.index, pool)
        runtime.synchronize(device)
        state = runtime.get_rng_state(device)
        try:
            torch.empty(1, device=device).uniform_()
        except RuntimeError:
            failed = f"a capture broke off: {type(error).__name__}"
            generator = runtime.default_generators[device.index]
            generator.graphsafe_set_state(generator.clone_state())
        runtime.set_rng_state(state, device)
        raise


class Captured:
    """`function(*inputs)`, whose results are tensors, and its gradients, always in the same memory.

    inputs: what the graphs read. outputs: what `forward` writes. from_above: the gradients of those outputs that
    require one, which `backward` reads; gradients: what it writes, one (or None) for each of `wanted`. Without
    `wanted` there is no backward.
    """

    def __init__(
        self,
        function: Callable[..., Sequence[Tensor]],
        inputs: Sequence[Tensor],
        wanted: Sequence[Tensor],
        pool: Any,
    ):
        self.inputs = inputs
        device = inputs[0].device
        graphs: Any = facts_of(device).graphs
        stream, now = _stream(device), graphs.current_stream(device)

        def captured(work: Callable[[], Any]) -> tuple[Any, Any]:
            graph = graphs.CUDAGraph()
            # thread_local: another thread, such as one that pins memory for batches, is not stopped
            with graphs.graph(graph, pool, stream, capture_error_mode="thread_local"):
                return graph, work()

        def gradients(outputs: Sequence[Tensor], from_above: Sequence[Tensor]) -> Any:
            roots = [y for y in outputs if y.requires_grad]
            return torch.autograd.grad(roots, wanted, from_above, allow_unused=True)

        def ones(outputs: Sequence[Tensor]) -> list[Tensor]:
            return [torch.ones_like(y) for y in outputs if y.requires_grad]

        with contextlib.ExitStack() as stack:
            stack.enter_context(_mended(device, pool))
            stack.enter_context(torch.random.fork_rng([device], device_type=device.type))
            stack.enter_context(graphs.device(device))
            stack.enter_context(host_is_free())
            stack.enter_context(torch.set_grad_enabled(bool(wanted)))
            stream.wait_stream(now)
            with graphs.stream(stream):  # kernels are compiled, and workspaces fetched, before
                outputs = function(*inputs)
                self.from_above = ones(outputs) if wanted else []
                if wanted:
                    gradients(outputs, self.from_above)
                del outputs
            now.wait_stream(stream)
            forward, outputs = captured(lambda: function(*inputs))
            self.gradients: list[Tensor | None] = []
            if wanted:
                backward, found = captured(lambda: gradients(outputs, self.from_above))
                self.gradients, self.backward = list(found), backward.replay
        self.forward = forward.replay
        self.differentiable = [y.requires_grad for y in outputs]
        self.outputs = [y.detach() for y in outputs]
