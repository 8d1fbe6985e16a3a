"""Patching at class level: every instance of a modeling file's classes is patched when it has been built."""

from __future__ import annotations

import contextlib
import functools
import importlib
import sys
import types
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn

from liger_kernel.transformers.modules import rope as rope_module
from liger_kernel.transformers.patching.sites.rope import Form, prove

_ROPE = "apply_rotary_pos_emb"
_building = 0  # depth of nested constructors: only the outermost model is patched


class GlobalPatch:
    """`module.name = value` while at least one holder wants it; `remove()` gives one hold back."""

    _holds: dict[tuple[str, str], list[Any]] = {}  # noqa: RUF012 - shared on purpose: (original, count)

    def __init__(self, module: types.ModuleType, name: str, value: Any):
        self._key, self._module, self._value = (module.__name__, name), module, value
        current = getattr(module, name)
        if current is not value:  # also after importlib.reload(module) put the original back
            self._holds[self._key] = [current, 0]
            setattr(module, name, value)
        self._holds[self._key][1] += 1
        self._held = True

    def remove(self) -> None:
        if self._held and self._key in self._holds:
            self._held = False
            hold = self._holds[self._key]
            hold[1] -= 1
            if hold[1] == 0:
                setattr(self._module, self._key[1], hold[0])
                del self._holds[self._key]

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
        global _building
        _building += 1
        try:
            original(self, *args, **kwargs)
        finally:
            _building -= 1
        if _building == 0:
            after(self)

    cls.__init__ = init

    def restore() -> None:
        if cls.__dict__.get("__init__") is init:
            if had:
                cls.__init__ = original
            else:
                del cls.__init__

    return restore


def model_classes(modeling: types.ModuleType) -> list[type]:
    """The classes of models that a modeling file defines with a constructor of their own."""
    from transformers import PreTrainedModel

    return [
        cls
        for cls in vars(modeling).values()
        if isinstance(cls, type)
        and issubclass(cls, PreTrainedModel)
        and cls.__module__ == modeling.__name__
        and "__init__" in cls.__dict__
    ]


@dataclass
class ClassPatch:
    """A standing patch of one modeling file, until `unpatch_classes`."""

    modeling: types.ModuleType
    stack: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)


_standing: dict[str, ClassPatch] = {}


def patch_classes(modeling_name: str, rope: bool, after: Callable[[nn.Module], None]) -> None:
    """Patch what is built from a modeling file from now on; a second call replaces the first."""
    unpatch_classes(modeling_name)
    modeling = importlib.import_module(modeling_name)
    standing = ClassPatch(modeling)
    standing.stack.enter_context(patched_on_init(model_classes(modeling), after))
    if rope:
        held = patch_rope_globally(modeling)
        if held is not None:
            standing.stack.callback(held.remove)
    _standing[modeling_name] = standing


def unpatch_classes(modeling_name: str) -> bool:
    """Take `patch_classes` back; False if the file was not patched. Models already built stay as they are."""
    standing = _standing.pop(modeling_name, None)
    if standing is None:
        return False
    if sys.modules.get(modeling_name) is standing.modeling:
        standing.stack.close()
    return True
