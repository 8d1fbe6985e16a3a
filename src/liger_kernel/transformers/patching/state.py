"""The record of every change made to a model, so that each can be taken back.

The record is plain data that hangs on the model itself: `copy.deepcopy(model)` copies it with the modules it names.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import sys
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, TypeVar, cast

from torch import Tensor, nn

from liger_kernel.transformers.patching.mixins import Mixin, mixed, set_class, without
from liger_kernel.transformers.patching.options import PatchOptions
from liger_kernel.transformers.patching.report import PatchReport

MISSING = "<missing>"  # a string, so that it stays the same value through deepcopy and pickle
KEY = "_liger_state"
OWNER = "_liger_of"  # on a module: the token of the state that it was replaced under; a copy has it, too


class Ours:
    """An attribute of ours that is bound to the one module that has it; it is copied and pickled with that."""


class Bound(Ours, functools.partial[Any]):
    """`function(module, ...)`."""


@dataclass
class Change:
    """`owner.name` was `before` and became `value` (MISSING: it is not there)."""

    owner: Any
    name: str
    before: Any
    value: Any

    def is_in_place(self) -> bool:
        """A class stays ours beneath those that FSDP2 and parametrisations make of it."""
        return self.name == "__class__" or _same(
            self.owner.__dict__.get(self.name, MISSING), self.value
        )

    def revert(self) -> None:
        """Put back what was there, unless somebody else has changed it since: that stays."""
        attributes = self.owner.__dict__
        if self.name == "__class__":
            if not is_replaced(self.owner):  # what a hook left is of the class that goes
                attributes.pop("forward", None)
            set_class(self.owner, without(type(self.owner)))
        elif _same(attributes.get(self.name, MISSING), self.value):
            if _same(self.before, MISSING):
                attributes.pop(self.name, None)
            else:
                attributes[self.name] = self.before


def _same(one: Any, other: Any) -> bool:
    return one is other or (isinstance(one, str) and isinstance(other, str) and one == other)


@dataclass
class State:
    """Everything `patch` did to one model."""

    options: PatchOptions
    report: PatchReport
    changes: list[Change] = field(default_factory=list)
    handles: list[Any] = field(default_factory=list)
    token: str = field(default_factory=lambda: uuid.uuid4().hex)

    @property
    def model(self) -> nn.Module:
        return cast(nn.Module, self.report.of)

    def set(self, owner: nn.Module, name: str, value: Any) -> None:
        """Set an instance attribute, past `nn.Module.__setattr__`."""
        self.changes.append(Change(owner, name, owner.__dict__.get(name, MISSING), value))
        owner.__dict__[name] = value

    def bind(self, owner: nn.Module, **methods: Callable[..., Any]) -> None:
        """Give `owner` methods of its own, and a shallow copy of it none of ours."""
        own = "__getstate__" in vars(owner)
        if not own and getattr(type(owner), "__getstate__", None) is _GETSTATE:
            methods["__getstate__"] = _Attributes
        for name, function in methods.items():
            self.set(owner, name, Bound(function, owner))

    def mix(self, owner: nn.Module, mixin: type[Mixin]) -> None:
        """A class with `mixin` for a module whose `forward` is that of its class."""
        if not is_replaced(owner) and "forward" in owner.__dict__:  # left by a hook
            left = owner.__dict__.pop("forward")
            self.changes.append(Change(owner, "forward", left, MISSING))
        self.set(owner, OWNER, self.token)
        self.changes.append(Change(owner, "__class__", MISSING, MISSING))
        set_class(owner, mixed(mixin, type(owner)))

    def is_in_place(self) -> bool:
        """Whether nobody has put anything else in the place of ours, or has added more of what was replaced."""
        standing = (getattr(handle, "is_in_place", None) for handle in self.handles)
        kinds = {type(change.owner) for change in self.changes if change.name == OWNER}
        return (
            all(check() for check in standing if check)
            and all(change.is_in_place() for change in self.changes)
            and all(OWNER in vars(m) for m in self.model.modules() if type(m) in kinds)
        )

    def renew(self) -> None:
        """What is in place takes up what is new."""
        for handle in self.handles:
            getattr(handle, "adopt", lambda: None)()

    def revert(self) -> None:
        for handle in self.handles:
            handle.remove()
        for change in reversed(self.changes):
            change.revert()
        self.changes.clear()
        self.handles.clear()
        for module in self.model.modules():  # copies that were made of parts, by PEFT for one
            if vars(module).get(OWNER) == self.token:
                set_class(module, without(type(module)))
                for name in vars(module).keys() - _without_ours(module).keys():
                    del module.__dict__[name]


def _without_ours(module: nn.Module) -> dict[str, Any]:
    attributes = vars(module).items()
    return {n: v for n, v in attributes if not (isinstance(v, Ours) or n.startswith("_liger"))}


class _Attributes(dict[str, Any]):
    """Those of a module for its `copy.copy`, which is another module: without ours, which are bound to the first.

    `copy.deepcopy` and `pickle` see all of them, and bind them anew.
    """

    def __init__(self, module: nn.Module):
        super().__init__(_without_ours(module))
        self.all = dict(vars(module))

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return copy.deepcopy(self.all, memo)

    def __reduce__(self) -> Any:
        return dict, (self.all,)


#: of a class that has none of its own; Python 3.10 has none at all
_GETSTATE = getattr(nn.Module, "__getstate__", None)


def state_of(model: nn.Module) -> State | None:
    return model.__dict__.get(KEY)


def is_replaced(module: nn.Module) -> bool:
    """Whether the instance has another `forward` than its class; a hook that was removed leaves that of the class."""
    own = module.__dict__.get("forward")
    return own is not None and getattr(own, "__func__", None) is not type(module).forward


def has_memory(t: Tensor) -> bool:
    """FSDP1 frees what it has gathered, and leaves the tensors as they were; to read them is a segmentation fault."""
    return t.is_meta or t.untyped_storage().nbytes() >= t.nbytes


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


def own_forward(module: nn.Module) -> Any:
    """The `forward` of the instance beneath such a hook, or beneath the collectives of `_of_sharded_experts`."""
    attributes = module.__dict__
    cell = _of_sharded_experts(module)
    if cell is not None:
        return cell.cell_contents
    return attributes.get("_old_forward", attributes.get("forward"))


_EXPERT_PARALLEL = "transformers.distributed.expert_parallel"


class _Experts:
    """As a cell: the forward that transformers 5.24 keeps in an object for each way to bring tokens to experts."""

    def __init__(self, ways: list[Any]):
        self.ways = ways

    @classmethod
    def of(cls, cell: Any) -> _Experts | None:
        first = cell.cell_contents
        ways = [w for w in (first, *vars(first).values()) if hasattr(w, "experts_forward")]
        return cls(ways) if first in ways else None

    @property
    def cell_contents(self) -> Any:
        return self.ways[0].experts_forward

    @cell_contents.setter
    def cell_contents(self, forward: Any) -> None:
        for way in self.ways:
            way.experts_forward = forward


def _of_sharded_experts(module: nn.Module) -> Any:
    """The cell with the forward around which transformers put the collectives of experts, each with its own rank's;
    None for any other module."""
    around, plan = module.__dict__.get("forward"), "transformers.distributed.tensor_parallel"
    code, home = getattr(around, "__code__", None), getattr(around, "__module__", None)
    if code is None or home not in (plan, _EXPERT_PARALLEL):
        return None
    closure = getattr(around, "__closure__", None) or ()
    cells = dict(zip(code.co_freevars, closure, strict=True))
    if home == _EXPERT_PARALLEL:
        of_module = "module" in cells and cells["module"].cell_contents is module
        return (
            _Experts.of(cells["implementation"])
            if of_module and "implementation" in cells
            else None
        )
    known = {"self", "module", "original_forward"} <= cells.keys()
    if not known or cells["module"].cell_contents is not module:
        return None
    style = getattr(sys.modules[plan], "MoeExpertsParallel", None)
    is_experts = type(cells["self"].cell_contents) is style
    return cells["original_forward"] if is_experts else None


@contextlib.contextmanager
def _hooks_lifted(model: nn.Module) -> Iterator[None]:
    lifted: list[tuple[nn.Module, Any, Any]] = []
    for module in model.modules() if isinstance(model, nn.Module) else ():
        attributes, cell = module.__dict__, _of_sharded_experts(module)
        hooked = {"forward", "_hf_hook", "_old_forward"} <= attributes.keys()
        if hooked or cell is not None:
            lifted.append((module, attributes["forward"], cell))
            attributes["forward"] = cell.cell_contents if cell else attributes.pop("_old_forward")
            if not is_replaced(module):
                del attributes["forward"]
    try:
        yield
    finally:
        for module, hook, cell in lifted:
            if cell is None:
                module.__dict__["_old_forward"] = module.forward
            else:
                cell.cell_contents = module.forward
            module.__dict__["forward"] = hook
