"""Plans: what a module was proven to compute, and how a plan takes the place of a method of that module."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from types import MethodType
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from liger_kernel._core.autograd import is_transformed
from liger_kernel.backends import kernels_requested
from liger_kernel.transformers.patching.facts import Facts, without_checkpoint
from liger_kernel.transformers.patching.linears import is_hooked
from liger_kernel.transformers.patching.state import OWNER, Bound, State, own_forward


class Plan:
    """What a place was proven to compute; `str(plan)` names the replacement in the report.

    Plain data: it is copied and pickled with its module.
    """

    def lost(self, module: nn.Module) -> str | None:
        """Why it does not run any more in `module`; None if it does."""
        return None


@dataclass(frozen=True)
class MethodPlan(Plan):
    """A plan for a method of a module: how our ops compute it."""

    kind: ClassVar[str]  # that of its site

    #: what it was proven for; None: installed without a proof
    facts: Facts | None = field(default=None, kw_only=True, compare=False, repr=False)

    @property
    def label(self) -> str:
        """What `print(model)` shows in front of the module's class."""
        return str(self)

    def holds(self, module: nn.Module) -> bool:
        """Whether the module still is what it was when this was proven."""
        facts = self.facts
        return facts is None or facts.hold(self, module)

    def lost(self, module: nn.Module) -> str | None:
        """As things are in the module; `lost` below knows what is around it."""
        return None if self.holds(module) else changed(module)

    def call(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """What `forward` computes now; a call form that was not proven goes to the module's own class."""
        if len(args) != 1 or kwargs:
            return type(module).forward(module, *args, **kwargs)
        return self.compute(module, args[0])

    def compute(self, module: nn.Module, x: Tensor) -> Tensor:
        """Our op, for the usual call form: one tensor."""
        raise NotImplementedError


def ours_runs() -> bool:
    """Whether a call made now is computed by our op, and not by HF's own code, where both were proven equal.

    Under `torch.compile` it is HF's: Inductor fuses that with its neighbours, and made more kernels of ours. Unless
    somebody asked for kernels by name (LIGER_KERNEL_IMPL): these run outside of the graph. Other transforms, such as
    those of torch.func, follow HF's code as well.
    """
    return not is_transformed() or (torch.compiler.is_compiling() and kernels_requested())


def marker(kind: str) -> str:
    """The attribute of a module that holds its plan of one kind."""
    return _MARKER + kind


_MARKER = "_liger_"


class Method(Bound):
    """What takes the place of a method of one module."""

    @property
    def __wrapped__(self) -> Any:
        """For `inspect.signature`: the method of the module's class."""
        module = self.args[0]
        return MethodType(type(module).forward, module)


def call(module: nn.Module, kind: str, *args: Any, **kwargs: Any) -> Any:
    plan: MethodPlan | None = module.__dict__.get(_MARKER + kind)
    # None: taken back; somebody had put a method of his own around this one
    if plan is not None and (not is_transformed() or ours_runs()) and plan.holds(module):
        return plan.call(module, *args, **kwargs)
    return type(module).forward(module, *args, **kwargs)


def run_layer(module: Any, ours: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """`ours(forward, module, *args, **kwargs)` around a layer's own forward, within the checkpoint that this begins.

    Before transformers 5.24 the checkpoint lay around the call of the layer, and so around all of this.
    """
    whole = type(module).forward
    forward = without_checkpoint(whole)
    if forward is whole or not (
        module.gradient_checkpointing and module.training and torch.is_grad_enabled()
    ):
        return ours(forward, module, *args, **kwargs)
    if any(kwargs.get(name) not in (None, False) for name in _CACHES):
        return whole(module, *args, **kwargs)  # which does without them, and says so
    return module._gradient_checkpointing_func(partial(ours, forward, module, **kwargs), *args)


_CACHES = ("use_cache", "cache", "past_key_values", "layer_past")


def runs_bare(module: nn.Module, plan: MethodPlan) -> bool:
    """Whether a call of the module made now is that of its plan, and nobody else sees it."""
    attributes = module.__dict__
    ours = getattr(attributes.get("forward"), "func", None) is call
    return ours and not is_hooked(attributes) and ours_runs() and plan.holds(module)


def lost(root: nn.Module, path: str, module: nn.Module, kind: str) -> str | None:
    """Why a plan that was installed in `module`, at `path` of `root`, does not run any more; None if it does."""
    try:
        there = root.get_submodule(path)
    except AttributeError:
        return "it is not there any more"
    moved = all(inner is not module for inner in there.modules())
    module = there if moved else module  # perhaps a copy that PEFT has made
    attributes = module.__dict__
    plan: MethodPlan | None = attributes.get(marker(kind))
    if plan is None and moved:
        return "another module took its place after patching"
    if plan is None:
        return "the patch was taken back"
    if getattr(own_forward(module), "func", None) is not call:
        return "its forward was replaced after patching"
    return plan.lost(module)


def changed(module: nn.Module) -> str:
    return f"{type(module).__name__} has changed since it was replaced, and runs its own code"


def name(module: nn.Module, kind: str) -> str:
    return f"{module.__dict__[marker(kind)].label}[{type(module).__name__}]"


def replicate(module: nn.Module) -> nn.Module:
    """A replica of `nn.DataParallel`, which has its module's attributes: what is bound to that is bound anew."""
    replica: nn.Module = type(module)._replicate_for_data_parallel(module)
    for key, value in module.__dict__.items():
        if isinstance(value, partial) and value.args[:1] == (module,):
            bound = type(value)(value.func, replica, *value.args[1:], **value.keywords)
            replica.__dict__[key] = bound
    return replica


def install(module: nn.Module, plan: MethodPlan, state: State) -> None:
    state.set(module, OWNER, state.token)
    state.set(module, marker(plan.kind), plan)
    state.set(module, "forward", Method(call, module, plan.kind))
    state.bind(
        module, _get_name=partial(name, kind=plan.kind), _replicate_for_data_parallel=replicate
    )
