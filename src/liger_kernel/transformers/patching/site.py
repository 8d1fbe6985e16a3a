"""A site: one kind of place in a model where a replacement of ours may go."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor, nn

from liger_kernel.transformers.patching import plans
from liger_kernel.transformers.patching.options import Option
from liger_kernel.transformers.patching.state import State, has_memory, is_replaced

Places = Iterable[tuple[str, nn.Module]]


def modules(wanted: Callable[[nn.Module], Any]) -> Callable[[nn.Module], Places]:
    """The usual `candidates`: the modules of a model that are `wanted`."""
    return lambda model: ((path, m) for path, m in model.named_modules() if wanted(m))


def _tensors(module: nn.Module) -> Iterator[Tensor]:
    for inner in module.modules():
        yield from (value for value in vars(inner).values() if isinstance(value, Tensor))


@dataclass(frozen=True)
class Site:
    """What `patch` has to know about one kind of replacement; `sites/__init__.py` lists them all.

    Attributes:
        options: any of them switches the site on.
        kind: of its rows in the report.
        candidates: the places in a model, as (path, module).
        prove: the plan for a module; or the reason why there is none; or None for a module that deserves no row.
        install: carries out a plan.
        replaces_forward: whether it is that of the module. Where an instance has its own, the report says so.
        grows: whether others add places to a model that is patched, for the next `patch` to visit.
    """

    options: tuple[Option, ...]
    kind: str
    candidates: Callable[[nn.Module], Places]
    prove: Callable[[nn.Module, State], plans.Plan | str | None]
    install: Callable[[nn.Module, Any, State], None] = plans.install
    replaces_forward: bool = True
    grows: bool = False

    def is_complete(self, model: nn.Module, state: State) -> bool:
        """Whether all of its places in `model` are in the report, which those that came after patching are not."""
        if not self.grows or not self._is_on(state):
            return True
        known = {row.path for row in state.report.rows if row.kind == self.kind}
        return all(path in known for path, _ in self.candidates(model))

    def _is_on(self, state: State) -> bool:
        return any(option.name in state.options.enabled for option in self.options)

    def patch(self, model: nn.Module, state: State) -> None:
        """Replace what can be replaced in `model`, and report all of it."""
        if not self._is_on(state):
            return
        for path, module in self.candidates(model):
            found = module.__dict__.get(plans.marker(self.kind))  # of an enclosing or earlier patch
            if isinstance(found, plans.MethodPlan) and not found.holds(module):
                found = plans.changed(module)
            if found is None and self.replaces_forward and is_replaced(module):
                found = "its forward was already replaced"
            if found is None and not all(map(has_memory, _tensors(module))):
                found = "FSDP1 has its weights; patch the model before it is wrapped"
            if found is None:
                found = self.prove(module, state)
                if isinstance(found, plans.Plan):
                    self.install(module, found, state)
            if isinstance(found, str):
                state.report.add(self.kind, path, reason=found)
            elif isinstance(found, plans.MethodPlan):
                check = partial(plans.lost, model, path, module, self.kind)
                state.report.add(self.kind, path, by=str(found), check=check)
            elif found is not None:
                check = partial(found.lost, module)
                state.report.add(self.kind, path, by=str(found), check=check)
