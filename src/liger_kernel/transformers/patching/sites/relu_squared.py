"""Activation modules that compute `max(x, 0)^2`."""

from __future__ import annotations

import inspect
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from liger_kernel.ops import relu_squared as relu_squared_op
from liger_kernel.transformers.patching import proof
from liger_kernel.transformers.patching.plans import MethodPlan
from liger_kernel.transformers.patching.site import Places, Site, modules
from liger_kernel.transformers.patching.sites.mlps import MLP


@dataclass(frozen=True)
class ReLUSquaredPlan(MethodPlan):
    """An activation module that computes `max(x, 0)^2`."""

    kind = "mlp"

    def __str__(self) -> str:
        return "LigerReLUSquared"

    def compute(self, module: nn.Module, x: Tensor) -> Tensor:
        return relu_squared_op.relu_squared(x)


def is_candidate(module: nn.Module) -> bool:
    """Without parameters and children, and none of torch's, since none of those is one; of one argument."""
    if module._modules or module._parameters or module._buffers:
        return False
    of_torch = type(module).__module__.startswith("torch.nn.")
    return not of_torch and len(inspect.signature(type(module).forward).parameters) == 2


@proof.verdict
def find_plan(module: nn.Module) -> ReLUSquaredPlan | None:
    """The proven plan for this module, or why there is none."""
    x = torch.randn(5, 48, generator=torch.Generator().manual_seed(0))
    forward, twin = type(module).forward, proof.clone(module, {}, {})
    exact = proof.Theirs(forward, twin, [x])
    rounded = proof.Theirs(forward, twin, [x.bfloat16()], backward=False)
    plan = ReLUSquaredPlan()
    return plan if exact.agrees(plan.compute) and rounded.rounds_like(plan.compute) else None


def _candidates(model: nn.Module) -> Places:
    """Only what is proven already: most activations are none of ours, and need no row that says so."""
    named = {c for m in model.modules() for name, c in m._modules.items() if "act" in name}
    proven = (m for m in named if m and is_candidate(m) and not isinstance(find_plan(m), str))
    return modules(set(proven).__contains__)(model)


SITE = Site(
    options=(MLP,),
    kind="mlp",
    candidates=_candidates,
    prove=lambda module, state: find_plan(module),
)
