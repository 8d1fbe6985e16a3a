"""Outputs of HF whose logits are made when somebody reads them.

`output.logits`, `output["logits"]`, `output[1]`, `output[:2]` and `to_tuple()` give a real tensor. Who walks over the
output, as DDP, FSDP and accelerate do, meets the deferred object by `items()`, `values()` and the names of dataclass
fields, and may rebuild the output with it.
"""

from __future__ import annotations

import copy
import sys
from collections import OrderedDict
from typing import Any, ClassVar, cast

import torch

from liger_kernel.transformers.patching.deferred import DeferredLogits


class _FieldName(str):
    """How `dataclasses` names a field: who reads an output by it (FSDP1 does) gets what is stored."""

    __slots__ = ()


class _Output:
    """What both kinds share; mixed into a class of HF's, `stock`."""

    stock: ClassVar[Any]

    def _real(self, name: str, value: Any) -> Any:
        if type(value) is DeferredLogits:
            value = value.materialize()
            setattr(self, name, value)  # into the mapping, too
        return value

    def __getitem__(self, key: Any) -> Any:
        if isinstance(key, str):
            return self._real(key, OrderedDict.__getitem__(cast(Any, self), key))
        names: Any = tuple(self.keys())[key]  # type: ignore[attr-defined]
        return self[names] if isinstance(names, str) else tuple(self[name] for name in names)

    def get(self, key: str, default: Any = None) -> Any:
        return default if key not in self else self[key]  # type: ignore[operator] # noqa: SIM401

    def copy(self) -> Any:
        return type(self)(**dict(self.items()))  # type: ignore[attr-defined]

    __copy__ = copy

    def __repr__(self) -> str:
        fields = ", ".join(f"{k}={v!r}" for k, v in self.items())  # type: ignore[attr-defined]
        return f"{self.stock.__name__}({fields})"

    def __reduce_ex__(self, protocol: Any) -> Any:
        """A copy and a pickle are HF's object, with real logits."""
        names = tuple(self.keys())  # type: ignore[attr-defined]
        return self.stock(**{str(name): self[name] for name in names}).__reduce_ex__(protocol)


class _Lazy(_Output):
    def __getattribute__(self, name: str) -> Any:
        value = super().__getattribute__(name)
        if type(value) is DeferredLogits and type(name) is str:
            return self._real(name, value)
        return value

    def __setitem__(self, key: str, value: Any) -> None:
        super().__setitem__(str(key), value)  # type: ignore[misc]


class _Traced(_Output):
    """As `_Lazy`; torch.compile makes no objects of classes that have `__getattribute__`, but knows properties."""

    def __post_init__(self) -> None:
        """HF's, but for reads of fields: torch 2.6 makes the output before the deferred object in it is complete."""
        attributes = self.__dict__
        names = [name for name in self.stock.__dataclass_fields__ if attributes[name] is not None]
        given = {name: attributes[name] for name in names}
        if len(names) == 1 and isinstance(given[names[0]], dict):  # as accelerate rebuilds it
            attributes[names[0]] = None
            given = dict(given[names[0]].items())
        for name, value in given.items():
            self[name] = value  # type: ignore[index]


def _property(name: str) -> property:
    def read(self: Any) -> Any:
        return self._real(name, self.__dict__.get(name))

    def write(self: Any, value: Any) -> None:
        self.__dict__[name] = value

    return property(read, write)


def _named(field: Any) -> Any:
    field = copy.copy(field)
    field.name = _FieldName(field.name)
    return field


def _make(mixin: type, stock: Any) -> Any:
    fields = stock.__dataclass_fields__
    body: dict[str, Any] = {"__module__": __name__, "stock": stock}
    if mixin is _Lazy:
        body["__dataclass_fields__"] = {name: _named(field) for name, field in fields.items()}
    else:
        body |= {name: _property(name) for name in fields}
    made = type(f"{mixin.__name__[1:]}{stock.__name__}", (mixin, stock), body)
    setattr(sys.modules[__name__], made.__name__, made)  # where compiled code looks for it
    return made


#: the classes, by HF's
LAZY: dict[Any, Any] = {}
TRACED: dict[Any, Any] = {}


def known(stock: Any) -> bool:
    """Make the classes for HF's; torch.compile calls this while it traces, and not what it does."""
    if stock not in LAZY:
        LAZY[stock], TRACED[stock] = _make(_Lazy, stock), _make(_Traced, stock)
    return True


known._dynamo_marked_constant = True  # type: ignore[attr-defined]


def lazy(output: Any) -> Any:
    """The output of HF that holds deferred logits, as one that makes them when they are read."""
    stock = type(output)
    if issubclass(stock, _Output):
        return output
    known(stock)
    if torch.compiler.is_compiling():
        return TRACED[stock](**dict(output.items()))
    output.__class__ = LAZY[stock]
    return output
