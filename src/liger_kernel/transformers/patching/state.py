"""The record of every change made to a model, so that each can be taken back.

The record is plain data that hangs on the model itself: `copy.deepcopy(model)` copies it with the modules it names.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, TypeVar, cast

from torch import nn

from liger_kernel.transformers.patching.options import PatchOptions
from liger_kernel.transformers.patching.report import PatchReport

MISSING = "<missing>"  # a string, so that it stays the same value through deepcopy and pickle
KEY = "_liger_state"


@dataclass
class Change:
    """`owner.name` was `before` (MISSING: it was not there)."""

    owner: Any
    name: str
    before: Any

    def revert(self) -> None:
        if self.name == "__class__":
            if not is_replaced(self.owner):  # what a hook left is of the class that goes
                self.owner.__dict__.pop("forward", None)
            self.owner.__class__ = self.before
        elif self.before is MISSING or self.before == MISSING:
            self.owner.__dict__.pop(self.name, None)
        else:
            self.owner.__dict__[self.name] = self.before


@dataclass
class State:
    """Everything `patch` did to one model."""

    options: PatchOptions
    report: PatchReport
    changes: list[Change] = field(default_factory=list)
    handles: list[Any] = field(default_factory=list)

    @property
    def model(self) -> nn.Module:
        return cast(nn.Module, self.report.of)

    def set(self, owner: nn.Module, name: str, value: Any) -> None:
        """Set an instance attribute, past `nn.Module.__setattr__`."""
        self.changes.append(Change(owner, name, owner.__dict__.get(name, MISSING)))
        owner.__dict__[name] = value

    def set_class(self, owner: nn.Module, cls: type) -> None:
        """Another class for a module whose `forward` is that of its class."""
        if "forward" in owner.__dict__:  # left by a hook
            self.changes.append(Change(owner, "forward", owner.__dict__.pop("forward")))
        self.changes.append(Change(owner, "__class__", type(owner)))
        owner.__class__ = cls

    def revert(self) -> None:
        for handle in self.handles:
            handle.remove()
        for change in reversed(self.changes):
            change.revert()
        self.changes.clear()
        self.handles.clear()


def state_of(model: nn.Module) -> State | None:
    return model.__dict__.get(KEY)


def is_replaced(module: nn.Module, method: str = "forward") -> bool:
    """Whether the instance has another `method` than its class; a hook that was removed leaves that of the class."""
    own = module.__dict__.get(method)
    return own is not None and getattr(own, "__func__", None) is not getattr(type(module), method)


_Function = TypeVar("_Function", bound=Callable[..., Any])


def beneath_hooks(function: _Function) -> _Function:
    """Lets `function(model, ...)` see and change the forwards that hooks of accelerate (`device_map`, offload) wrap.

    A hooked module has the hook as its `forward`, and what it wraps as `_old_forward`, looked up at every call.
    """

    @functools.wraps(function)
    def beneath(model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        with _hooks_lifted(model):
            return function(model, *args, **kwargs)

    return cast(_Function, beneath)


@contextlib.contextmanager
def _hooks_lifted(model: nn.Module) -> Iterator[None]:
    lifted = []
    for module in model.modules() if isinstance(model, nn.Module) else ():
        attributes = module.__dict__
        if {"forward", "_hf_hook", "_old_forward"} <= attributes.keys():
            lifted.append((module, attributes["forward"]))
            attributes["forward"] = attributes.pop("_old_forward")
            if not is_replaced(module):
                del attributes["forward"]
    try:
        yield
    finally:
        for module, hooked in lifted:
            module.__dict__.update(_old_forward=module.forward, forward=hooked)
