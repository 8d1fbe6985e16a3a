"""Decoder layers: each residual sum, and the norm after it, as one op, forward and backward.

The layer's own forward runs, on a `Sum` in the place of its hidden states. It is proven on a clone that this meets
norms and additions only, and that the layer computes the same; the layer's inputs and outputs are tensors, as before,
and so are those of all of its children but the norms.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from liger_kernel._core.autograd import is_transformed
from liger_kernel.backends import host_bound, served_alike
from liger_kernel.transformers.patching import proof, stand_ins
from liger_kernel.transformers.patching.options import Option
from liger_kernel.transformers.patching.plans import MethodPlan, marker, run_layer, runs_bare
from liger_kernel.transformers.patching.site import Places, Site
from liger_kernel.transformers.patching.sites.norms import NormPlan, size_of, twin_of
from liger_kernel.transformers.patching.sites.norms import find_plan as find_norm
from liger_kernel.transformers.patching.sites.norms import is_candidate as is_norm_module
from liger_kernel.transformers.patching.state import State
from liger_kernel.transformers.patching.sums import Sum
from liger_kernel.transformers.patching.waiting import real

#: elements of the hidden states up to which a GPU is done before the host: norm and sum are PyTorch's own ops there
_SMALL = 2**22


@dataclass(frozen=True)
class ResidualPlan(MethodPlan):
    """The forward of a layer on a `Sum`, which its children `norms` take; `first` names the hidden states."""

    kind = "residual"

    norms: tuple[str, ...]
    first: str

    @property
    def label(self) -> str:
        return "LigerResidual"

    def __str__(self) -> str:
        return f"sums with {', '.join(self.norms)}"

    def lost(self, module: nn.Module) -> str | None:
        for name in self.norms:
            if not _takes_sums(module, name):
                return f"{name} is hooked, or no norm of ours any more"
        return super().lost(module)

    def call(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        forward = type(module).forward
        x = args[0] if args else kwargs.get(self.first)
        if (
            type(x) is not Tensor
            or host_bound(x, _SMALL)
            or is_transformed()
            or not served_alike(("fused_add_rms_norm", "rms_norm"), x.device.type)
            or not all(_takes_sums(module, name) for name in self.norms)
        ):
            return forward(module, *args, **kwargs)
        return run_layer(module, self._on_sums, *args, **kwargs)

    def _on_sums(self, forward: Any, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if args:
            return real(forward(module, Sum(args[0]), *args[1:], **kwargs))
        return real(forward(module, **{**kwargs, self.first: Sum(kwargs[self.first])}))


def is_norm(child: Any) -> bool:
    return child is not None and is_norm_module(child)


def _is_fit(plan: Any) -> bool:
    """Whether `fused_add_rms_norm` computes what a norm was proven to compute."""
    return isinstance(plan, NormPlan) and plan.can_wait


def _takes_sums(module: nn.Module, name: str) -> bool:
    norm = module.__dict__["_modules"].get(name)
    plan: Any = None if norm is None else norm.__dict__.get(marker("norm"))
    if not _is_fit(plan) or not runs_bare(norm, plan):
        return False
    return type(norm.__dict__["_parameters"].get("weight")) in (nn.Parameter, type(None))


def candidates(model: nn.Module) -> Places:
    """What stands in a row of layers, and has a norm."""
    rows = (m for m in model.modules() if isinstance(m, nn.ModuleList))
    layers = {m for row in rows for m in row if m and any(map(is_norm, m._modules.values()))}
    return ((path, m) for path, m in model.named_modules() if m in layers)


def _run_on_sums(
    layer: nn.Module, x: Tensor, norms: dict[str, NormPlan], reached: set[str]
) -> Tensor:
    """`stand_ins.run` as the plan has it; notes the norms that get a sum."""

    def take(name: str, norm: Any, h: Any) -> Tensor:
        if not isinstance(h, Sum):
            return norms[name].call(norm, h)
        reached.add(name)
        with proof.of_ours():
            return norms[name].call(norm, h)

    for name in norms:
        norm = layer._modules[name]
        norm.__dict__["forward"] = partial(take, name, norm)
    try:
        found: Tensor = real(stand_ins.run(layer, Sum(x)))
        return found
    finally:
        for name in norms:
            del layer._modules[name].__dict__["forward"]


@proof.verdict
def find_plan(module: nn.Module) -> ResidualPlan | None:
    """The proven plan for this layer, or why there is none."""
    children: dict[str, Any] = module._modules
    found = {name: find_norm(child) for name, child in children.items() if is_norm(child)}
    norms: Any = {name: plan for name, plan in found.items() if _is_fit(plan)}
    if not norms:
        return None
    x = torch.randn(5, 1, size_of(children[next(iter(norms))]))
    kept = {name: twin_of(children[name], torch.float32, torch.float32) for name in norms}
    for twin in stand_ins.twins(module, kept):
        reached: set[str] = set()
        ours = partial(_run_on_sums, norms=norms, reached=reached)
        if (
            proof.ends(ours, twin, x)
            and reached
            and proof.Theirs(stand_ins.run, twin, [x]).agrees(ours)
        ):
            of_layer = tuple(name for name in norms if name in reached)
            return ResidualPlan(of_layer, stand_ins.parameters(module)[0].name)
    return None


def _prove(module: nn.Module, state: State) -> ResidualPlan | None:
    """Layers without a sum in front of a norm of ours need no row that says so."""
    found = find_plan(module)
    return None if isinstance(found, str) or found.lost(module) else found


SITE = Site(
    options=(
        Option("residual", True, "residual sums of decoder layers, with the norms after them."),
    ),
    kind="residual",
    candidates=candidates,
    prove=_prove,
)
