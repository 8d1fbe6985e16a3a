"""The record of every change made to a model, so that each can be taken back.

The record is plain data that hangs on the model itself: `copy.deepcopy(model)` copies it with the modules it names.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import nn

from liger_kernel.transformers.patching.options import Options
from liger_kernel.transformers.patching.report import PatchReport

MISSING = (
    "<missing>"  # a string, so that it stays the same object-value through deepcopy and pickle
)
KEY = "_liger_state"


@dataclass
class Change:
    """`owner.name` was `before` (MISSING: it was not there)."""

    owner: Any
    name: str
    before: Any

    def revert(self) -> None:
        if self.name == "__class__":
            self.owner.__class__ = self.before
        elif self.before is MISSING or self.before == MISSING:
            self.owner.__dict__.pop(self.name, None)
        else:
            self.owner.__dict__[self.name] = self.before


@dataclass
class State:
    """Everything `patch` did to one model."""

    options: Options
    report: PatchReport
    changes: list[Change] = field(default_factory=list)
    handles: list[Any] = field(default_factory=list)

    def set(self, owner: nn.Module, name: str, value: Any) -> None:
        """Set an instance attribute, past `nn.Module.__setattr__`."""
        self.changes.append(Change(owner, name, owner.__dict__.get(name, MISSING)))
        owner.__dict__[name] = value

    def set_class(self, owner: nn.Module, cls: type) -> None:
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
