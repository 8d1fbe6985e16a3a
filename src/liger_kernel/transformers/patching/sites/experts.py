"""Experts of a mixture: the gated product between transformers' two grouped matrix products.

transformers (5 and later) runs the experts of most models by one function of its registry, named by
`config._experts_implementation`, which calls the module's `_apply_gate` between the two products. That method is what
is replaced. Weights, routing and the products themselves are transformers' business.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from itertools import product, starmap
from typing import Any

import torch
from torch import Tensor, nn

from liger_kernel.ops import glu as glu_op
from liger_kernel.transformers.patching import facts, proof
from liger_kernel.transformers.patching.plans import MethodPlan
from liger_kernel.transformers.patching.site import Site, modules
from liger_kernel.transformers.patching.sites.mlps import MLP, Gate, far, gates
from liger_kernel.transformers.patching.state import State

_GATE = "_apply_gate"


@dataclass(frozen=True)
class ExpertsPlan(MethodPlan):
    """`act(gate) * up` of (S, 2I) rows, the gate in the first half, or in the even places."""

    kind = "experts"
    slot = _GATE

    form: Gate
    interleaved: bool

    def __str__(self) -> str:
        return self.form.named("interleaved gate_up" if self.interleaved else "fused gate_up")

    def compute(self, module: nn.Module, x: Tensor) -> Tensor:
        form = self.form
        return glu_op.glu_packed(
            x,
            form.activation,
            limit=form.limit,
            alpha=form.alpha,
            interleaved=self.interleaved,
        )


def is_candidate(module: nn.Module) -> bool:
    """What the registry runs, and what else is called experts and holds weights."""
    if hasattr(type(module), _GATE):
        return True
    named = "expert" in type(module).__name__.lower()
    return named and any(p is not None for p in module._parameters.values())


@partial(proof.verdict, slot=_GATE)
def find_plan(module: nn.Module) -> ExpertsPlan | None:
    """The proven plan for this module's gate, or why there is none."""
    twin = proof.clone(module, {}, {})
    gate_up = 3 * torch.randn(5, 96, generator=torch.Generator().manual_seed(0))
    gate = getattr(type(module), _GATE)
    exact = [proof.Theirs(gate, twin, [x]) for x in (gate_up, far(gate_up))]
    rounded = proof.Theirs(gate, twin, [gate_up.bfloat16()], backward=False)
    numbers = (v for kind in (float, int) for v in facts.numbers(module, kind, _GATE).values())
    for plan in starmap(ExpertsPlan, product(gates(numbers), (False, True))):
        if all(t.agrees(plan.compute) for t in exact) and rounded.rounds_like(plan.compute):
            return plan
    return None


def _prove(module: nn.Module, state: State) -> ExpertsPlan | str:
    return _left_alone(module) or find_plan(module)


def _left_alone(module: nn.Module) -> str | None:
    """Why the gate of an experts module cannot be reached, if so."""
    if not hasattr(type(module), _GATE):
        return f"{type(module).__name__} is not run by transformers' experts registry"
    if not getattr(module, "has_gate", True):
        return "no gate between its two products"
    function: Any = type(module).forward
    name = "own"
    # wrapped by the registry, which has no name for the module's own code
    if hasattr(function, "__wrapped__"):
        from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

        name = str(getattr(getattr(module, "config", None), "_experts_implementation", None))
        function = ALL_EXPERTS_FUNCTIONS.get(name, function.__wrapped__)
    if _GATE not in function.__code__.co_names:
        return f"the {name} implementation has its own gate; set_experts_implementation('grouped_mm') has not"
    return None


SITE = Site(
    options=(MLP,),
    kind="experts",
    candidates=modules(is_candidate),
    prove=_prove,
    slot=_GATE,
)
