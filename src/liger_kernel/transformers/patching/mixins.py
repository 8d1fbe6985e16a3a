"""Classes made at run time: a module of any class with a mixin of ours in front, and back."""

from __future__ import annotations

import copyreg
from typing import Any, cast

#: classes made here -> (mixin, the class without it)
_MADE: dict[type, tuple[type, type]] = {}


class Mixin:
    """What our mixins derive from: an object whose class was made here is copied and pickled by what it is made of."""

    prefix = ""

    def __reduce_ex__(self, protocol: Any) -> Any:
        made, args, *rest = cast(Any, super().__reduce_ex__(protocol))
        if made is copyreg.__newobj__ and type(self) in _MADE:  # type: ignore[attr-defined]
            return (_new, _MADE[type(self)], *rest)
        return (made, args, *rest)


def mixed(mixin: type[Mixin], cls: type) -> Any:
    """`cls` with `mixin` in front, the same one at every call."""
    for made, parts in _MADE.items():
        if parts == (mixin, cls):
            return made
    name = mixin.prefix + cls.__name__
    return register(type(name, (mixin, cls), {"__module__": mixin.__module__}))


def register(made: Any) -> Any:
    """Decorates a class that `mixed` shall give for its two bases."""
    _MADE[made] = made.__bases__
    return made


def made_of(cls: type) -> Any:
    """The class that `mixed` made `cls` of; any other one itself."""
    return _MADE[cls][1] if cls in _MADE else cls


def without(cls: Any) -> Any:
    """`cls` without our mixins, also where FSDP2 or a parametrisation has made a class of its own on top."""
    if cls in _MADE:
        return without(_MADE[cls][1])
    bases = tuple(map(without, cls.__bases__))
    if bases == cls.__bases__:
        return cls
    body = {k: v for k, v in vars(cls).items() if k not in ("__dict__", "__weakref__")}
    name = cls.__name__
    for ours, theirs in zip(cls.__bases__, bases, strict=True):
        name = name.replace(ours.__name__, theirs.__name__)
    return type(name, bases, body)


def set_class(owner: Any, cls: type) -> None:
    """Past `__setattr__`, which a compiled module has for the module that it wraps."""
    object.__setattr__(owner, "__class__", cls)


def _new(mixin: type[Mixin], cls: type) -> Any:
    made = mixed(mixin, cls)
    return made.__new__(made)
