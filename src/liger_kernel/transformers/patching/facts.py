"""The facts that a proof holds for: what a module's function depends on besides its parameters.

They are read off the code before a module is proven: the attributes that its forward names, the methods and globals
behind it, and the same of the children that a replacement does not call. Modules with the same facts share a verdict.
A replaced module compares them at every call, and runs its own code where one of them has changed.
"""

from __future__ import annotations

import copy
import functools
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from enum import Enum
from types import (
    BuiltinFunctionType,
    CodeType,
    FunctionType,
    MethodType,
    ModuleType,
    NoneType,
)
from typing import Any

import torch
from torch import Tensor, nn

from liger_kernel.transformers.patching.linears import is_inert, is_watched
from liger_kernel.transformers.patching.state import Ours

#: what every module has: torch's business, and the same for all
_COMMON = frozenset([*dir(nn.Module), *vars(nn.Module()), "__getstate__"])
#: code that uses one of these may read any attribute
_ANY_NAME = frozenset(["getattr", "vars", "__dict__", "attrgetter"])
# fmt: off
_WRAPPERS = (
    FunctionType, MethodType, staticmethod, classmethod, property, functools.partial,
    functools.partialmethod, type(functools.lru_cache(len)),
)
#: what nobody changes in place, or to other numbers (a log), and what somebody may
_FIXED = (
    NoneType, bool, int, float, complex, str, bytes, Enum, type, BuiltinFunctionType,
    torch.dtype, torch.device, logging.Logger, *_WRAPPERS,
)
# fmt: on
#: of a layer's forward that begins its own checkpoint: the same numbers, so no facts
_CHECKPOINTING = frozenset(["gradient_checkpointing", "_gradient_checkpointing_func"])
_NOWHERE = object()

Globals = dict[tuple[FunctionType, str], Any]


@functools.cache
def _names(code: CodeType) -> frozenset[str]:
    """What code calls by name; strings, too: `getattr(self, "eps")`."""
    inner = [_names(c) for c in code.co_consts if isinstance(c, CodeType)]
    strings = (c for c in code.co_consts if isinstance(c, str) and c.isidentifier())
    return frozenset().union(code.co_names, strings, *inner)


class Reading:
    """What a function may read: `names`, those of them that are `members` of a class, and `globals` of its file.

    With what decorators wrapped, the methods of the class, and the functions that it calls by a global name; torch's
    are taken as they are.
    """

    def __init__(self, start: Any = None, cls: type = object, *slots: str):
        self.names: set[str] = {*slots}
        self.members: dict[str, Any] = {}
        self.inherited: list[tuple[type, str, Any]] = []  # what `super()` may reach
        self.globals: Globals = {}
        waiting, seen = (
            [start, *(m for s in slots for m in self._defined(cls, s))],
            dict[int, Any](),
        )
        while waiting:
            value = waiting.pop()
            if id(value) in seen or not isinstance(value, _WRAPPERS):
                continue
            seen[id(value)] = value
            waiting += [
                getattr(value, n, None) for n in ("__wrapped__", "__func__", "fget", "func")
            ]
            if isinstance(value, FunctionType):
                waiting += self._enter(value, cls)
        self.known = any(isinstance(value, FunctionType) for value in seen.values())

    def holds(self, cls: type) -> bool:
        """Whether `cls`, of which this was read, is what it was."""
        # no generator: every Linear with adapters comes here
        for name, value in self.members.items():
            now = getattr(cls, name, _NOWHERE)
            if now is not value and now != value:  # `__dict__` is another object each time
                return False
        return unchanged(self.globals)

    def _enter(self, function: FunctionType, cls: type) -> Iterator[Any]:
        """Note what one function names, and what is to be read next."""
        yield from _held(function)
        names = _names(function.__code__)
        for name in names & function.__globals__.keys():
            value = function.__globals__[name]
            if not isinstance(value, ModuleType):
                self.globals[function, name] = value
                if not getattr(value, "__module__", None) or not is_of_torch(value):
                    yield value
        for name in names - self.names - self.members.keys():
            yield from self._defined(cls, name)
        self.names |= names

    def _defined(self, cls: type, name: str) -> list[Any]:
        """A member of the class, and those of the same name that it inherits."""
        owners = [c for c in cls.__mro__ if name in vars(c) and c not in (nn.Module, object)]
        if owners:
            self.members[name] = getattr(cls, name)
            self.inherited += ((c, name, vars(c)[name]) for c in owners[1:])
        return [vars(c)[name] for c in owners]


def is_of_torch(value: Any) -> bool:
    return str(value.__module__).partition(".")[0] == "torch"


def unchanged(found: Globals) -> bool:
    """Whether the globals of a `Reading` are what they were."""
    for (function, name), value in found.items():  # noqa: SIM110 - a generator takes three times as long
        if function.__globals__.get(name) is not value:
            return False
    return True


def kept(make: Callable[[Any], Any]) -> Any:
    """A cache of `make(function)`, good for as long as the globals that the function may read stay what they are."""
    made: dict[Any, tuple[Globals, Any]] = {}

    @functools.wraps(make)
    def get(function: Any) -> Any:
        found = made.get(function)
        if found is None or not unchanged(found[0]):
            found = made[function] = Reading(function).globals, make(function)
        return found[1]

    get.cache_clear = made.clear  # type: ignore[attr-defined]
    return get


def _is_fixed(value: Any) -> bool:
    """Whether a value never changes in place."""
    if isinstance(value, tuple):
        return all(map(_is_fixed, value))
    return isinstance(value, _FIXED) and not (
        isinstance(value, functools.partial) and value.keywords
    )


def _held(function: FunctionType) -> Iterator[Any]:
    """What its closure holds; `_NOWHERE` for a name without a value so far."""
    for cell in function.__closure__ or ():
        try:
            yield cell.cell_contents
        except ValueError:
            yield _NOWHERE


def _is_opaque(value: Any) -> bool:
    """Whether something behind a value may change where no comparison sees it.

    So it is in objects that are called, in what the closure of a function holds, and in arrays.
    """
    if isinstance(value, functools.partial):
        return any(map(_is_opaque, (value.func, *value.args, *value.keywords.values())))
    if isinstance(value, (list, tuple)):
        return any(map(_is_opaque, value))
    if isinstance(value, MethodType):
        return not isinstance(value.__self__, type)
    if isinstance(value, FunctionType):
        held = _held(value)
        return any(isinstance(c, nn.Module) or not _is_fixed(c) or _is_opaque(c) for c in held)
    if _is_fixed(value) or isinstance(value, (nn.Module, dict, set, frozenset)):
        return False
    return callable(value) or not hasattr(value, "__dict__")


def _pinned(value: Any, names: frozenset[str], depth: int = 3) -> Any:
    """A value as it is now, for a comparison later: what can change in place is copied, of objects what is named."""

    def pinned(values: Any) -> tuple[Any, ...]:
        return tuple(_pinned(v, names, depth - 1) for v in values)

    if isinstance(value, functools.partial):
        return pinned((value.func, value.args, value.keywords))
    if isinstance(value, dict):
        return (type(value), *value, *pinned(value.values()))
    if isinstance(value, (set, frozenset)):
        return frozenset(value)
    if isinstance(value, (list, tuple)):
        return (type(value), *pinned(value))
    if _is_fixed(value) or isinstance(value, nn.Module) or not hasattr(value, "__dict__"):
        return value
    return value, pinned(getattr(value, n, None) for n in sorted(names)) if depth else None


def _is_of_class(forward: Any) -> bool:
    """Whether what an instance has as its `forward` computes what its class does; ours is proven to."""
    return forward is None or isinstance(forward, Ours)


def is_equal(a: Any, b: Any) -> bool:
    try:
        return bool(a == b)
    except Exception:  # tensors in a list, and whatever else cannot be compared
        return False


@dataclass(frozen=True)
class Part:
    """The facts of the module itself (`path` is empty), or of a child that its replacement does not call."""

    path: tuple[str, ...]
    names: frozenset[str]
    #: attributes of the instance, comparable with those of other modules
    values: tuple[tuple[str, Any], ...]
    #: those that never change in place, as they are, and the others
    plain: tuple[tuple[str, Any], ...] = field(compare=False)
    pinned: tuple[tuple[str, Any], ...] = field(compare=False)
    #: of the class, those that an attribute of the instance would hide, and those of its bases
    members: tuple[tuple[str, Any], ...]
    overridable: frozenset[str]
    inherited: tuple[tuple[type, str, Any], ...]
    globals: tuple[tuple[tuple[FunctionType, str], Any], ...]
    #: what can change in place of the class (None) and of a function's file
    shared: tuple[tuple[FunctionType | None, str, Any], ...]
    absent: tuple[str, ...]  # parameters that are None
    #: buffers and other tensors that the code names, and what else may change unseen
    tensors: tuple[str, ...] = field(compare=False)

    @classmethod
    def of(cls, module: nn.Module, path: tuple[str, ...] = ()) -> Part:
        kind, attributes = type(module), module.__dict__
        # what transformers' registry of experts calls beside the forward
        reading = Reading(None, kind, "forward", "_apply_gate")
        names = frozenset(reading.names) - _CHECKPOINTING
        members = {n: v for n, v in reading.members.items() if n not in _CHECKPOINTING}
        if "forward" in members:
            members["forward"] = without_checkpoint(members["forward"])
        whole = not reading.known or not _ANY_NAME.isdisjoint(names)
        wanted = (n for n in attributes if n not in _COMMON and not n.startswith("_liger"))
        read = {n: attributes[n] for n in wanted if n != "forward" and (whole or n in names)}
        tensors = [n for n, v in read.items() if isinstance(v, Tensor) or _is_opaque(v)]
        tensors += [n for n, b in module._buffers.items() if b is not None and n in names]
        values = {n: _pinned(v, names) for n, v in read.items() if n not in tensors}
        plain = {n: read[n] for n in values if _is_fixed(read[n])}
        changing: list[tuple[FunctionType | None, str, Any]]
        changing = [(None, n, v) for n, v in members.items() if not _is_fixed(v)]
        found = reading.globals
        for value in read.values():
            value = getattr(value, "func", value)  # of a partial
            if isinstance(value, FunctionType) and not is_of_torch(value):
                behind = Reading(value)
                found |= behind.globals
                names |= behind.names
        changing += [(f, n, v) for (f, n), v in found.items() if not _is_fixed(v)]
        return cls(
            path,
            names,
            values=tuple(values.items()),
            plain=tuple(plain.items()),
            pinned=tuple((n, v) for n, v in values.items() if n not in plain),
            members=tuple(members.items()),
            overridable=frozenset(members) - read.keys() - {"forward"},
            inherited=tuple(reading.inherited),
            globals=tuple(found.items()),
            shared=tuple((f, n, p) for f, n, v in changing if (p := _pinned(v, names)) is not v),
            absent=tuple(n for n, p in module._parameters.items() if p is None and n in names),
            tensors=tuple(tensors),
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> Part:
        own = {name: copy.deepcopy(getattr(self, name), memo) for name in ("plain", "pinned")}
        return replace(self, **own)

    def hold(self, module: nn.Module) -> bool:
        attributes, kind = module.__dict__, type(module)
        if self.path and (is_watched(attributes) or not _is_of_class(attributes.get("forward"))):
            return False
        for name, value in self.plain:
            now = attributes.get(name, _NOWHERE)
            if now is not value and (type(now) is not type(value) or now != value):
                return False
        for name, value in self.members:
            now = getattr(kind, name, _NOWHERE)
            if now is not value and now != value and without_checkpoint(now) is not value:
                return False
        for owner, name, value in self.inherited:
            if vars(owner).get(name) is not value:
                return False
        if self.overridable and not self.overridable.isdisjoint(attributes):
            return False
        for name in self.absent:
            if attributes["_parameters"].get(name) is not None or name in attributes:
                return False
        for (function, name), value in self.globals:
            if function.__globals__.get(name) is not value:
                return False
        return not (self.pinned or self.shared) or self._hold_in_place(attributes, kind)

    def _hold_in_place(self, attributes: dict[str, Any], kind: type) -> bool:
        now = [(attributes.get(name), value) for name, value in self.pinned]
        now += [
            (function.__globals__.get(name) if function else getattr(kind, name, None), value)
            for function, name, value in self.shared
        ]
        return all(is_equal(_pinned(v, self.names), value) for v, value in now)


def parts_of(module: nn.Module, path: tuple[str, ...] = ()) -> Iterator[Part]:
    yield Part.of(module, path)
    for name, child in module._modules.items():
        if child is not None and is_inert(child):
            yield from parts_of(child, (*path, name))


def without_checkpoint(forward: Any) -> Any:
    """What transformers 5.24 wraps in each class of layers, and in FSDP2's subclass of it, to begin a checkpoint."""
    while "_gradient_checkpointing_func" in getattr(
        getattr(forward, "__code__", None), "co_names", ()
    ) and hasattr(forward, "__wrapped__"):
        forward = forward.__wrapped__
    return forward


def numbers(module: nn.Module, kind: type) -> dict[str, Any]:
    """The numbers of a type that the forward of a module names, and that the module or its class holds."""
    part = Part.of(module)
    return {n: v for n, v in (*part.members, *part.plain) if type(v) is kind}


class Facts:
    """All parts of a module, and `find`, which proves: a pickle keeps only that, and is proven again when it runs."""

    def __init__(self, find: Callable[[nn.Module], Any], parts: tuple[Part, ...] | None = None):
        self.find, self.parts = find, parts

    def __reduce__(self) -> Any:
        return Facts, (self.find,)

    def __deepcopy__(self, memo: dict[int, Any]) -> Facts:
        return Facts(self.find, copy.deepcopy(self.parts, memo))

    def hold(self, plan: Any, module: nn.Module) -> bool:
        """Whether `plan`, found when these were the facts, is still what `module` computes."""
        if self.parts is None:
            found = self.find(module)
            if found != plan:
                return False
            self.parts = found.facts.parts
        for part in self.parts or ():
            at: Any = module
            for name in part.path:
                at = at.__dict__["_modules"].get(name)
                if at is None:
                    return False
            if not part.hold(at):
                return False
        return True
