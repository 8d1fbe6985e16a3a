"""What every kind of replacement shares: the walk over a model's modules, and the attributes that a plan takes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, ClassVar

import torch
from torch import nn

from liger_kernel.transformers.patching.state import State, is_replaced


class Plan:
    """What a module was proven to compute, and how our ops compute it. Plain data: it is copied with its module."""

    kind: ClassVar[str]  # of its rows in the report
    slot: ClassVar[str] = (
        "forward"  # the method that an attribute of the instance takes the place of
    )

    @property
    def label(self) -> str:
        """What `print(model)` shows in front of the module's class."""
        return str(self)

    def call(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """What the slot computes now; a call form that was not proven goes to the module's own class."""
        raise NotImplementedError


def marker(kind: str) -> str:
    """The attribute of a module that holds its plan of one kind."""
    return f"_liger_{kind}"


def call(module: nn.Module, kind: str, *args: Any, **kwargs: Any) -> Any:
    plan: Plan = module.__dict__[marker(kind)]
    if torch.compiler.is_compiling():  # Inductor fuses HF's own code with its neighbours
        return getattr(type(module), plan.slot)(module, *args, **kwargs)
    return plan.call(module, *args, **kwargs)


def name(module: nn.Module, kind: str) -> str:
    return f"{module.__dict__[marker(kind)].label}[{type(module).__name__}]"


def install(module: nn.Module, plan: Plan, state: State) -> None:
    state.set(module, marker(plan.kind), plan)
    state.set(module, plan.slot, partial(call, module, plan.kind))
    state.set(module, "_get_name", partial(name, module, plan.kind))


def untouched(
    model: nn.Module,
    state: State,
    kind: str,
    wanted: Callable[[nn.Module], bool],
    slot: str = "forward",
) -> Iterator[tuple[str, nn.Module]]:
    """The `wanted` modules of `model` whose slot is still their class'; the report says what the others carry."""
    for path, module in model.named_modules():
        if not wanted(module):
            continue
        plan = module.__dict__.get(marker(kind))
        if plan is not None:  # by an enclosing or earlier patch
            state.report.add(kind, path, by=str(plan))
        elif is_replaced(module, slot):
            state.report.add(kind, path, reason=f"its {slot} was already replaced")
        else:
            yield path, module
