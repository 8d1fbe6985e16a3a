"""Patching at class level: every instance of a modeling file's classes, those that live already and those built later.

The classes stay HF's. Their constructors are wrapped, so that the outermost instance is patched as soon as it is built;
what was built before is found among the objects of Python's garbage collector.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import importlib
import threading
import types
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from liger_kernel.transformers.modules import rope as rope_module
from liger_kernel.transformers.patching import unpatch
from liger_kernel.transformers.patching.sites.rope import Form, prove
from liger_kernel.transformers.patching.state import KEY, state_of

_ROPE = "apply_rotary_pos_emb"


class _Building(threading.local):
    depth = 0  # of nested constructors: only the outermost module is patched


_building = _Building()


class GlobalPatch:
    """`module.name = value` while at least one holder wants it; `remove()` gives one hold back."""

    _holds: dict[tuple[str, str], list[Any]] = {}  # noqa: RUF012 - shared on purpose: (original, count)
    _own: list[Any] | None = None  # the one that this patch counts in
    _late: list[GlobalPatch] = []  # noqa: RUF012 - shared on purpose: those that died while Dynamo compiled

    def __init__(self, module: types.ModuleType, name: str, value: Any):
        self.settle()
        self._key, self._module, self._value = (module.__name__, name), module, value
        current = getattr(module, name)
        if current is not value:  # also after importlib.reload(module) put the original back
            self._holds[self._key] = [current, 0]
            setattr(module, name, value)
        self._own = self._holds.setdefault(self._key, [value, 0])  # it may be somebody else's doing
        self._own[1] += 1

    def remove(self) -> None:
        self._give_back()
        self.settle()

    @classmethod
    def settle(cls) -> None:
        """Give back what is held by models that died while Dynamo compiled."""
        late, cls._late[:] = [*cls._late], []
        for patch in late:
            patch._give_back()

    def _give_back(self) -> None:
        hold, self._own = self._own, None
        if hold is None or self._holds.get(self._key) is not hold:
            return
        hold[1] -= 1
        if hold[1] == 0:
            if getattr(self._module, self._key[1], None) is self._value:
                setattr(self._module, self._key[1], hold[0])
            del self._holds[self._key]

    def __del__(self) -> None:
        """With the last reference to the model that held it.

        The collector runs at any time, also while Dynamo compiles another model that reads these globals: its guards
        would be about a function that is gone. Ours computes the same, so it may stay until the next patch.
        """
        if torch._guards.CompileContext.try_get() is None:
            self.remove()
        else:
            self._late.append(self)

    def __reduce__(self) -> Any:
        """A copy, and what is unpickled in another process, is a hold of its own."""
        return _hold, (*self._key, self._value)


def _hold(module: str, name: str, value: Any) -> GlobalPatch:
    return GlobalPatch(importlib.import_module(module), name, value)


def patch_rope_globally(modeling: types.ModuleType) -> GlobalPatch | None:
    """Put the public `liger_rotary_pos_emb` on a modeling file, if it is proven to compute the same."""
    original = getattr(modeling, _ROPE, None)
    ours = rope_module.liger_rotary_pos_emb
    if original is None:
        return None
    forms = () if original is ours else prove(original)
    if original is not ours and Form() not in [
        replace(f, narrow="") for f in forms if isinstance(f, Form)
    ]:
        return None
    return GlobalPatch(modeling, _ROPE, ours)


@contextlib.contextmanager
def patched_on_init(classes: Iterable[type], after: Callable[[nn.Module], None]) -> Iterator[None]:
    """Call `after(model)` on every outermost instance of `classes` built inside the block."""
    handles = [_wrap_init(cls, after) for cls in classes]
    try:
        yield
    finally:
        for handle in handles:
            handle()


def _wrap_init(cls: Any, after: Callable[[nn.Module], None]) -> Callable[[], None]:
    had, original = "__init__" in cls.__dict__, cls.__init__

    @functools.wraps(original)
    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        _building.depth += 1
        try:
            original(self, *args, **kwargs)
        finally:
            _building.depth -= 1
        if _building.depth == 0:
            after(self)

    cls.__init__ = init

    def restore() -> None:
        if cls.__dict__.get("__init__") is init:
            if had:
                cls.__init__ = original
            else:
                del cls.__init__

    return restore


def module_classes(modeling: types.ModuleType) -> tuple[type[nn.Module], ...]:
    """The classes of modules that a modeling file defines."""
    return tuple(
        cls
        for cls in vars(modeling).values()
        if isinstance(cls, type)
        and issubclass(cls, nn.Module)
        and cls.__module__ == modeling.__name__
    )


@dataclass(frozen=True)
class OfClasses:
    """In the state of a module that was patched with its class: revert finds it there, in copies of the module, too."""

    modeling: str

    def remove(self) -> None:
        """The classes stay patched."""


@dataclass
class ClassPatch:
    """A standing patch of one modeling file, until `unpatch_classes`."""

    classes: tuple[type[nn.Module], ...]
    options: dict[str, bool]
    stack: contextlib.ExitStack


_standing: dict[str, ClassPatch] = {}
_LOSSES = ("cross_entropy", "fused_linear_cross_entropy")


def patch_classes(
    name: str,
    options: dict[str, bool],
    patch_one: Callable[[nn.Module, dict[str, bool], str], None],
) -> None:
    """Patch all instances of a modeling file's classes by `patch_one(module, options, name)`.

    Options of several calls add up; of the two kinds of loss, which exclude each other, the later one counts.
    """
    from transformers import PreTrainedModel

    modeling = importlib.import_module(name)
    classes = module_classes(modeling)
    before = _standing.get(name)
    if (
        before is not None and before.classes == classes
    ):  # importlib.reload(modeling) undoes a patch
        lost = any(options[loss] for loss in _LOSSES)
        kept = {n for n, on in before.options.items() if on and not (lost and n in _LOSSES)}
        options = {n: on or n in kept for n, on in options.items()}
    unpatch_classes(name)

    def after(module: nn.Module) -> None:
        whole = isinstance(module, PreTrainedModel)
        patch_one(module, options if whole else {**options, **dict.fromkeys(_LOSSES, False)}, name)
        state = state_of(module)
        if state is not None:
            state.handles.append(OfClasses(name))

    with contextlib.ExitStack() as stack:
        stack.callback(_unpatch_living, name)
        stack.enter_context(patched_on_init(classes, after))
        if options["rope"] and (held := patch_rope_globally(modeling)) is not None:
            stack.callback(held.remove)
        for module in _unpatched(classes):
            after(module)
        _standing[name] = ClassPatch(classes, options, stack.pop_all())


def unpatch_classes(name: str) -> bool:
    """Take `patch_classes` back, in living instances, too; False if the file was not patched."""
    standing = _standing.pop(name, None)
    if standing is not None:
        standing.stack.close()
    return standing is not None


def _living() -> list[nn.Module]:
    objects = gc.get_objects()
    return [o for o in objects if issubclass(type(o), nn.Module) and "_modules" in vars(o)]


def _unpatched(classes: tuple[type[nn.Module], ...]) -> list[nn.Module]:
    """The living instances that are part of no other, nor of anything that somebody has patched."""
    living = _living()
    wanted = [m for m in living if issubclass(type(m), classes)]
    patched = [m for m in living if KEY in vars(m)]
    parts = (child for m in (*wanted, *patched) for child in m.modules() if child is not m)
    taken = {*map(id, parts), *map(id, patched)}
    return [m for m in wanted if id(m) not in taken]


def _unpatch_living(name: str) -> None:
    for module in _living():
        state = state_of(module)
        if state is not None and OfClasses(name) in state.handles:
            unpatch(module)
