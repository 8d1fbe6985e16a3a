"""A module's calls as graphs: who may be replayed, and the node that replays.

A graph does again what the host asked for once, whatever has become of the module. So each belongs to a form of call
(shapes, dtypes and strides of the tensors, all other arguments, modes) and to a state of the module (`Snapshot`), and
is replayed for these alone. A form is captured when it comes a second time. Anything else is computed as ever.

`torch.cuda.make_graphed_callables` is no help here: the gradients that it returns are the graph's own memory, which
becomes `p.grad`, so that the next backward overwrites what it should be added to; and it does not notice a second
forward before the backward of the first.
"""

from __future__ import annotations

import contextlib
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from itertools import chain, repeat
from operator import is_
from typing import Any

import torch
from torch import Tensor, nn

from liger_kernel._core.autograd import (
    autocast_dtype_of,
    has_numbers,
    is_transformed,
    observes_saved_tensors,
    refuse_double_backward,
)
from liger_kernel.backends import graphs, is_capturing
from liger_kernel.transformers.patching.facts import Reading
from liger_kernel.transformers.patching.linears import _GLOBAL_HOOKS, is_hooked
from liger_kernel.transformers.patching.state import Ours

#: forms of a call that are captured, states of a module that are remembered, forms that came once, and states one
#: after the other that brought no replay
_FORMS, _STATES, _SEEN, _VAIN = 8, 4, 256, 16


class Unfit(Exception):
    """Why a call is computed without a graph."""


class Snapshot:
    """What decides, beside its inputs, what a module computes: all attributes beneath it, where its tensors are, and
    the code of its classes.

    Attributes are compared by identity; so are the contents of containers and of the config, and what the code names.
    """

    def __init__(self, module: nn.Module):
        modules = list(module.modules())
        if any(is_hooked(inner.__dict__) for inner in modules[1:]) or any(_GLOBAL_HOOKS):
            raise Unfit("a module in it has a hook")
        self.modules, self.kinds = modules, list(map(type, modules))
        self.code = _Code(self.kinds)
        self.buffers = list(module.buffers())
        self.tensors = [*module.parameters(), *self.buffers]
        kinds = {type(t).__name__ for t in self.tensors if type(t) not in (nn.Parameter, Tensor)}
        if kinds:
            raise Unfit(f"it holds a {', '.join(sorted(kinds))}")
        if any(t.requires_grad for t in self.buffers):
            raise Unfit("a buffer in it is trained")
        self.weights = [inner._parameters for inner in modules if inner._parameters]
        tables: dict[int, Any] = {}
        for inner in modules:
            _gather(inner.__dict__, tables)
            _gather(getattr(inner.__dict__.get("config"), "__dict__", None), tables)
        self.empty = [table for table in tables.values() if not table]
        views = (t.values() if isinstance(t, dict) else t for t in tables.values() if t)
        self.views: list[Any] = list(views)
        self.sizes = list(map(len, self.views))
        self.values = list(chain.from_iterable(self.views))
        self.memory = self._memory()
        self.trained = [t for t in self.tensors if t.requires_grad]
        self.forms: dict[Any, Graph] = {}
        self.seen: set[Any] = set()

    def leaves(self) -> list[Tensor]:
        """The trained weights as leaves of their own, in the same memory.

        Where gradients arrive is tied to the stream on which a weight was first used, as long as any graph holds it, a
        loss of the last step for one; that stream would have to wait for the one that is captured.
        """
        return [nn.Parameter(t.detach()) for t in self.trained]

    @contextlib.contextmanager
    def on(self, leaves: list[Tensor]) -> Iterator[None]:
        """Let the module compute with `leaves`."""
        instead: dict[int, Any] = {id(t): u for t, u in zip(self.trained, leaves, strict=True)}
        tables = [(table, dict(table)) for table in self.weights]
        try:
            for table, weights in tables:
                table.update({n: instead.get(id(p), p) for n, p in weights.items()})
            yield
        finally:
            for table, weights in tables:
                table.update(weights)

    @contextlib.contextmanager
    def unwritten(self) -> Iterator[None]:
        """Run the module without a trace in its buffers, such as the statistics of a BatchNorm."""
        before = [(b, b._version, b.clone()) for b in self.buffers]
        yield
        for buffer, version, numbers in before:
            if buffer._version != version:
                with torch.no_grad():
                    buffer.copy_(numbers)

    def _memory(self) -> list[Any]:
        return [(t.data_ptr(), t.requires_grad) for t in self.tensors]

    def holds(self) -> bool:
        return (
            not any(self.empty)
            and not any(_GLOBAL_HOOKS)
            and list(map(len, self.views)) == self.sizes
            and all(map(is_, chain.from_iterable(self.views), self.values))
            and self._memory() == self.memory
            and all(map(is_, map(type, self.modules), self.kinds))
            and self.code.holds()
        )


class _Code:
    """What the forwards of classes name: members of these, and globals of their files, as they are now."""

    def __init__(self, kinds: Sequence[type]):
        members: list[tuple[type, str, Any]] = []
        tables: dict[int, tuple[Any, dict[str, Any]]] = {}
        for cls in dict.fromkeys(kinds):
            found = Reading(None, cls, "forward")
            # a method of the class, for one, is another object each time
            members += ((cls, n, v) for n, v in found.members.items() if getattr(cls, n) is v)
            for (function, name), value in found.globals.items():
                table = function.__globals__
                tables.setdefault(id(table), (table, {}))[1][name] = value
        self.places = [(cls, name) for cls, name, _ in members]
        self.values = [value for *_, value in members]
        self.globals = list(tables.values())

    def holds(self) -> bool:
        now = (getattr(cls, name, None) for cls, name in self.places)
        return all(map(is_, now, self.values)) and all(
            all(map(is_, map(table.get, names), names.values())) for table, names in self.globals
        )


_CONTAINERS: Any = (dict, OrderedDict, list, set, tuple)


def _gather(table: Any, tables: dict[int, Any]) -> None:
    """The container, and those in it."""
    if type(table) in _CONTAINERS and id(table) not in tables:
        tables[id(table)] = table
        for value in table.values() if isinstance(table, dict) else table:
            _gather(value, tables)


def _trains_with_others() -> bool:
    """Their gradients are gathered, and their weights, by hooks and streams of which a graph knows nothing."""
    dist = torch.distributed
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


class _Turn:
    """A forward whose backward reads the graph's memory."""

    done = False


class Record(Ours):
    """The graphs of one module. A copy of the module has none yet."""

    def __init__(self) -> None:
        self.states: list[Snapshot] = []
        self.pool: Any = None
        self.vain = 0
        self.turn: Callable[[], _Turn | None] = lambda: None
        self.broken: str | None = None
        self.reason: str | None = None

    def __deepcopy__(self, memo: Any) -> Record:
        return Record()

    def __reduce__(self) -> Any:
        return Record, ()

    def remove(self) -> None:
        """Give the memory back; when the patch is taken back."""
        self.states, self.pool = [], None

    def is_busy(self) -> bool:
        turn = self.turn()
        return turn is not None and not turn.done

    def call(self, module: nn.Module, forward: Any, args: Any, kwargs: Any) -> Any:
        """`forward(*args, **kwargs)`."""
        try:
            form, tensors = self._form(module, args, kwargs)
            state = self._state(module)
            if self.is_busy():
                raise Unfit("two forwards came before a backward")
            captured = state.forms.get(form)
            if captured is None and self._is_new(state, form):
                self.reason = None
                return forward(*args, **kwargs)
            if captured is None:
                captured = self._capture(module, state, form, tensors, forward, (args, kwargs))
        except Unfit as unfit:
            self.reason = str(unfit)
            return forward(*args, **kwargs)
        self.reason, self.vain = None, 0
        return captured.replay(self, state, tensors)

    def _form(self, module: nn.Module, args: Any, kwargs: Any) -> tuple[Any, list[Tensor]]:
        if graphs.failed is not None:
            self.remove()
        reason = self.broken or graphs.failed
        if reason is not None:
            raise Unfit(reason)
        if getattr(module, "gradient_checkpointing", False) and module.training:
            raise Unfit("gradient checkpointing is on")
        grad = torch.is_grad_enabled()
        if grad and observes_saved_tensors():
            raise Unfit("somebody has to see what is saved for backward, or torch 2.6 cannot tell")
        tensors: list[Tensor] = []
        form = [grad, _form_of((args, kwargs), tensors)]
        device = tensors[0].device if tensors else torch.device("meta")
        if any(t.device != device or not has_numbers(t) for t in tensors):
            raise Unfit("its inputs are on several devices, or have no numbers")
        if not graphs.has_graphs(device):
            raise Unfit(f"there are no graphs on {device.type}")
        if is_transformed() or is_capturing(device) or torch.is_inference_mode_enabled():
            raise Unfit("it is traced, captured or run in inference mode")
        if "_is_replica" in module.__dict__:
            raise Unfit("it is a replica of DataParallel")
        if _trains_with_others():
            raise Unfit("several processes train together")
        backends = torch.backends.cuda
        form += [
            autocast_dtype_of(device.type),
            torch.are_deterministic_algorithms_enabled(),
            torch.get_float32_matmul_precision(),
            backends.flash_sdp_enabled(),
            backends.mem_efficient_sdp_enabled(),
            backends.math_sdp_enabled(),
            backends.cudnn_sdp_enabled(),
        ]
        return tuple(form), tensors

    def _state(self, module: nn.Module) -> Snapshot:
        """That of the module as it is now, the latest last."""
        for i, state in enumerate(reversed(self.states), 1):
            if state.holds():
                if i > 1:
                    self.states.append(self.states.pop(-i))
                return state
        self.vain += 1
        if self.vain > _VAIN:
            self.broken = "it has other attributes in every call"
            raise Unfit(self.broken)
        self.states = [*self.states[1 - _STATES :], Snapshot(module)]
        return self.states[-1]

    def _is_new(self, state: Snapshot, form: Any) -> bool:
        """Whether it is the first of its kind, which runs as ever: kernels are compiled, and there may be no other."""
        if form in state.seen:
            return False
        if len(state.seen) >= _SEEN:
            state.seen.clear()
        state.seen.add(form)
        return True

    def _capture(
        self,
        module: nn.Module,
        state: Snapshot,
        form: Any,
        tensors: list[Tensor],
        forward: Any,
        call: Any,
    ) -> Graph:
        if len(state.forms) >= _FORMS:
            raise Unfit(f"it was called in more than {_FORMS} forms, such as lengths")
        try:
            graph = Graph(self, state, tensors, forward, call)
        except Unfit:
            raise
        except (
            Exception
        ) as error:  # the module's own code, in which the host may wait for the device
            self.broken = f"it cannot be captured: {type(error).__name__}: {str(error).strip().splitlines()[0][:120]}"
            raise Unfit(self.broken) from error
        if not state.holds():
            self.broken = "its forward changes attributes, which a graph would not"
            raise Unfit(self.broken)
        state.forms[form] = graph
        return graph


class Graph:
    """One form of call, captured."""

    def __init__(
        self, record: Record, state: Snapshot, tensors: list[Tensor], forward: Any, call: Any
    ):
        inputs = [t.detach().clone().requires_grad_(t.requires_grad) for t in tensors]
        device, dtype = inputs[0].device, autocast_dtype_of(inputs[0].device.type)
        leaves = state.leaves()
        self.needs = [t.requires_grad for t in (*inputs, *leaves)]
        wanted = [t for t in (*inputs, *leaves) if t.requires_grad]

        def function(*inputs: Tensor) -> list[Tensor]:
            args, kwargs = _filled(call, iter(inputs))
            # weights that are cast are kept for others otherwise, in memory of the graph
            cast = torch.autocast(device.type, dtype, dtype is not None, cache_enabled=False)
            with cast, state.on(leaves):
                output = forward(*args, **kwargs)
            found: list[Tensor] = []
            _form_of(output, found)
            self.shape = _filled(output, repeat(_HOLE))
            return found

        if record.pool is None:
            record.pool = graphs.new_pool(device)
        trains = torch.is_grad_enabled()
        with state.unwritten():
            self.captured = graphs.Captured(function, inputs, wanted if trains else [], record.pool)
        if any(t._version for t in inputs):
            raise ValueError("it writes over what it is given")
        alike: dict[torch.dtype, list[int]] = {}
        for i, t in enumerate(inputs):
            alike.setdefault(t.dtype, []).append(i)
        self.copies = [([inputs[i] for i in places], places) for places in alike.values()]

    def replay(self, record: Record, state: Snapshot, tensors: list[Tensor]) -> Any:
        if self.captured.gradients:
            found = _Replay.apply(record, self, len(tensors), *tensors, *state.trained)
        else:
            with torch.no_grad():
                found = self.run(tensors)
        return _filled(self.shape, iter(found))

    def run(self, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """The outputs, in memory of their own: somebody may hold them beyond the next call."""
        for static, places in self.copies:
            torch._foreach_copy_(static, [tensors[i] for i in places])
        self.captured.forward()
        return tuple(y.clone() for y in self.captured.outputs)


class _Replay(torch.autograd.Function):
    """Forward and backward of a graph, given what may require a gradient: its inputs, then the trained weights."""

    @staticmethod
    def forward(ctx: Any, record: Record, graph: Graph, count: int, *tensors: Tensor) -> Any:
        ctx.set_materialize_grads(False)
        ctx.of_forward = record, graph
        ctx.turn = _Turn()
        record.turn = weakref.ref(ctx.turn)
        found = graph.run(tensors[:count])
        fixed = zip(found, graph.captured.differentiable, strict=True)
        ctx.mark_non_differentiable(*(y for y, needs in fixed if not needs))
        return found

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        refuse_double_backward()
        record, graph = ctx.of_forward
        if record.turn() is not ctx.turn or ctx.turn.done:
            raise RuntimeError(
                "A layer that was captured as a graph keeps nothing for a second backward (retain_graph=True), and "
                "gives its memory to the next forward. Patch the model without cuda_graphs."
            )
        ctx.turn.done = True
        captured = graph.captured
        above = [g for g, needs in zip(grads, captured.differentiable, strict=True) if needs]
        for static, grad in zip(captured.from_above, above, strict=True):
            static.zero_() if grad is None else static.copy_(grad)
        captured.backward()
        # in memory of their own: they become `p.grad`, and are added to
        static = [g for g in captured.gradients if g is not None]
        fresh = iter(torch._foreach_mul(static, 1) if static else ())
        of_wanted = iter(None if g is None else next(fresh) for g in captured.gradients)
        return None, None, None, *(next(of_wanted) if need else None for need in graph.needs)


_HOLE = object()


def _form_of(value: Any, tensors: list[Tensor]) -> Any:
    """What a call depends on beside the numbers in its tensors, which are noted."""
    kind = type(value)
    if kind is Tensor:
        tensors.append(value)
        return value.shape, value.stride(), value.dtype, value.requires_grad
    if kind in (tuple, list):
        return kind, *(_form_of(v, tensors) for v in value)
    if kind is dict:
        return tuple((name, _form_of(v, tensors)) for name, v in value.items())
    if value is None or kind in (bool, int, float, str, torch.dtype):
        return kind, value
    raise Unfit(f"a {kind.__name__} goes in or out")


def _filled(value: Any, tensors: Iterator[Any]) -> Any:
    """`value` with others in the places of its tensors, in their order."""
    kind = type(value)
    if kind is Tensor or value is _HOLE:
        return next(tensors)
    if kind in (tuple, list):
        return kind(_filled(v, tensors) for v in value)
    return {k: _filled(v, tensors) for k, v in value.items()} if kind is dict else value
