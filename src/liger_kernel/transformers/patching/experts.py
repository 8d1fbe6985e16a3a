"""Experts of a mixture: the gated product between transformers' two grouped matrix products.

transformers (5 and later) runs the experts of most models by one function of its registry, named by
`config._experts_implementation`, which calls the module's `_apply_gate` between the two products. That method is what
is replaced. Weights, routing and the products themselves are transformers' business.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from liger_kernel.ops import glu as glu_op
from liger_kernel.transformers.patching import proof, walk
from liger_kernel.transformers.patching.mlps import ACTIVATIONS
from liger_kernel.transformers.patching.state import State

_GATE = "_apply_gate"


@dataclass(frozen=True)
class ExpertsPlan(walk.Plan):
    """`act(gate) * up` of (S, 2I) rows, the gate in the first half."""

    kind = "experts"
    slot = _GATE

    activation: str

    def __str__(self) -> str:
        return f"{ACTIVATIONS[self.activation]}(fused gate_up)"

    def call(self, module: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
        if len(args) != 1 or kwargs:
            return getattr(type(module), _GATE)(module, *args, **kwargs)
        return glu_op.glu_packed(args[0], self.activation)


_plans: dict[Any, ExpertsPlan | None] = {}


def is_candidate(module: nn.Module) -> bool:
    """What the registry runs, and what else is called experts and holds weights."""
    if hasattr(type(module), _GATE):
        return True
    named = "expert" in type(module).__name__.lower()
    return named and any(p is not None for p in module._parameters.values())


def find_plan(module: nn.Module) -> ExpertsPlan | None:
    """The proven plan for this module's gate, or None."""
    key = proof.key(module)
    if key not in _plans:
        plans = map(ExpertsPlan, ACTIVATIONS)
        _plans[key] = next((p for p in plans if proof.attempt(partial(_proves, module, p))), None)
    return _plans[key]


def _proves(module: nn.Module, plan: ExpertsPlan) -> bool:
    gate_up = 3 * torch.randn(5, 96, generator=torch.Generator().manual_seed(0))
    twin = proof.clone(module, {}, dict(module._modules))  # type: ignore[arg-type]
    theirs = partial(getattr(type(module), _GATE), twin)
    ours = partial(glu_op.glu_packed, activation=plan.activation)
    return proof.same_function(
        proof.run(ours, [gate_up], []), proof.run(theirs, [gate_up], [])
    ) and torch.equal(ours(gate_up.bfloat16()), theirs(gate_up.bfloat16()))


def patch_experts(model: nn.Module, state: State) -> None:
    """Fuse the gate of every experts module of `model` that is proven to be one of ours; say so of all others."""
    for path, module in walk.untouched(model, state, "experts", is_candidate, _GATE):
        reason = _left_alone(module)
        plan = None if reason else find_plan(module)
        if plan is not None:
            walk.install(module, plan, state)
            state.report.add("experts", path, by=str(plan))
        else:
            reason = reason or f"{type(module).__name__} computes something else"
            state.report.add("experts", path, reason=reason)


def _left_alone(module: nn.Module) -> str | None:
    """Why the gate of an experts module cannot be reached, if so."""
    if not hasattr(type(module), _GATE):
        return f"{type(module).__name__} is not run by transformers' experts registry"
    if not getattr(module, "has_gate", True):
        return "no gate between its two products"
    function: Any = type(module).forward
    name = "own"
    if hasattr(
        function, "__wrapped__"
    ):  # by the registry, which has no name for the module's own code
        name = str(getattr(getattr(module, "config", None), "_experts_implementation", None))
        function = _registry().get(name, function.__wrapped__)
    if _GATE not in function.__code__.co_names:
        return f"the {name} implementation has its own gate; set_experts_implementation('grouped_mm') has not"
    return None


def _registry() -> Any:
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    return ALL_EXPERTS_FUNCTIONS
