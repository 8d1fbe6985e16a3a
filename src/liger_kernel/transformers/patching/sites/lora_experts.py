"""Experts with adapters of PEFT on their weights (`target_parameters`): the low ranks go into the experts' own node.

PEFT adds the product of the adapters to the stack of all experts in every call, which takes the memory and the time of
another stack. Its wrappers, one inside the other, have one weight each. What they do now is looked up in every call;
where that is no sum of one product (merged, switched off, several adapters, hooks), PEFT's code runs.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from liger_kernel._core.dtensor import is_dtensor
from liger_kernel.ops.fused_moe import fused_moe
from liger_kernel.ops.fused_moe.contract import MoEOptions
from liger_kernel.transformers.patching import adapters, plans, proof
from liger_kernel.transformers.patching.facts import Reading
from liger_kernel.transformers.patching.linears import is_hooked, matmul_weight
from liger_kernel.transformers.patching.site import Places, Site
from liger_kernel.transformers.patching.sites.experts import ExpertsPlan
from liger_kernel.transformers.patching.sites.lora import LORA
from liger_kernel.transformers.patching.state import State

_SWAPPED = "_did_swap_in_out_features"


@dataclass(frozen=True)
class LoRAExpertsPlan(plans.MethodPlan):
    """`base_layer(x, index, weights)` with a low rank beside its weights."""

    kind = adapters.LoRAPlan.kind

    def __str__(self) -> str:
        return "LoRA in the node of the experts"

    def holds(self, module: nn.Module) -> bool:
        """PEFT's class has the code that was proven; the rest is looked up in every call."""
        return not isinstance(_verdict(module), str)

    def call(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        *_, base = _chain(module)
        plan = base.__dict__.get(plans.marker(ExpertsPlan.kind))
        if isinstance(plan, ExpertsPlan) and plans.runs_bare(base, plan):
            given = plan.given(base, args, kwargs)
            low_ranks = None if given is None else _read(module, plan)
            if given is not None and low_ranks is not None:
                return plan.compute(base, *given, **low_ranks)
        return type(module).forward(module, *args, **kwargs)


def _is_wrapper(module: nn.Module) -> bool:
    wanted = {"base_layer", "lora_A", "lora_B"}
    return "parameter_name" in module.__dict__ and wanted <= module._modules.keys()


def _chain(module: nn.Module) -> Iterator[Any]:
    """PEFT's wrappers from the outermost on, and the module with the weights."""
    yield module
    while _is_wrapper(module):
        module = module.__dict__["_modules"]["base_layer"]
        yield module


def _candidates(model: nn.Module) -> Places:
    wrappers = [(path, m) for path, m in model.named_modules() if _is_wrapper(m)]
    inner = {id(m.base_layer) for _, m in wrappers}
    return ((path, m) for path, m in wrappers if id(m) not in inner)


def _read(module: nn.Module, plan: ExpertsPlan) -> dict[str, Any] | None:
    """The low ranks as options of `fused_moe`; None where PEFT does anything else now."""
    found: dict[str, Any] = {}
    *wrappers, base = _chain(module)
    for wrapper in wrappers:
        if wrapper.disable_adapters or wrapper.merged or wrapper.get_base_layer() is not base:
            return None
        if wrapper is not module and (is_hooked(vars(wrapper)) or "forward" in vars(wrapper)):
            return None
        children, name = wrapper.__dict__["_modules"], wrapper.parameter_name
        table_a, table_b = (children[n].__dict__["_modules"] for n in ("lora_A", "lora_B"))
        active = [n for n in wrapper.active_adapters if n in table_a]
        if not active:
            continue
        place = "gate_up" if name == plan.first else "down"
        a, b = (matmul_weight(table[active[0]]) for table in (table_a, table_b))
        if len(active) > 1 or a is None or b is None or f"{place}_lora" in found:
            return None
        if wrapper.num_experts < 2 or is_dtensor(a) or is_dtensor(b):
            return None
        swapped = getattr(wrapper, _SWAPPED, False)
        found[f"{place}_lora"] = _matrices(a, b, wrapper.num_experts, swapped, plan.options)
        found[f"{place}_scaling"] = wrapper.scaling[active[0]]
    return found


def _matrices(
    a: Tensor, b: Tensor, n_experts: int, swapped: bool, options: MoEOptions
) -> tuple[Tensor, Tensor]:
    """A (E, R, in) and B (E, out, R) of PEFT's two matrices of all experts.

    PEFT takes a weight for (E, in, out), or `swapped` for (E, out, in). Where that is not what the experts do with it,
    A is what stands on the side of the outputs.
    """
    first = a.reshape(n_experts, -1, a.shape[1])
    second = b.reshape(b.shape[0], -1, n_experts).permute(2, 0, 1)
    return (first, second) if swapped != options.transposed else (second.mT, first.mT)


class _Experts(nn.Module):
    """Three experts, which PEFT wraps in the proof."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.randn(3, 20, 12))
        self.down_proj = nn.Parameter(torch.randn(3, 12, 10))

    def forward(self, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        return fused_moe(x, self.gate_up_proj, self.down_proj, index, weights)


def _twin(module: nn.Module, swapped: bool) -> nn.Module:
    """Small wrappers of the same class around experts, with one adapter each."""
    twin: nn.Module = _Experts()
    sizes = {name: p.shape[1:] for name, p in twin.named_parameters()}
    for rank, (name, size) in enumerate(sizes.items(), 2):
        n_in, n_out = size[::-1] if swapped else size
        children: dict[str, nn.Module] = {
            "base_layer": twin,
            "lora_A": nn.ModuleDict({"a": nn.Linear(n_in, 3 * rank, bias=False)}),
            "lora_B": nn.ModuleDict({"a": nn.Linear(3 * rank, n_out, bias=False)}),
            "lora_dropout": nn.ModuleDict({"a": nn.Identity()}),
        }
        twin = proof.clone(module, {}, children)
        twin.__dict__ |= {
            "_disable_adapters": False,
            "_active_adapter": ["a"],
            "merged_adapters": [],
            "lora_variant": {},
            "scaling": {"a": 1.5},
            "parameter_name": name,
            "num_experts": 3,
            _SWAPPED: swapped,
        }
    return twin


@adapters.verdict_of_class
def _verdict(module: nn.Module) -> LoRAExpertsPlan | None:
    """The plan, if PEFT's code computes it, for weights of either orientation."""
    plan = ExpertsPlan("gate_up_proj", MoEOptions())
    index = torch.tensor([[0, 2], [2, 1], [0, 1], [2, 0], [1, 2]])

    def theirs(twin: nn.Module, x: Tensor, weights: Tensor) -> Any:
        return type(twin).forward(twin, x, index, weights)

    def ours(twin: nn.Module, x: Tensor, weights: Tensor) -> Tensor:
        *_, base = _chain(twin)
        low_ranks: Any = _read(twin, plan)
        return plan.compute(base, x, index, weights, **low_ranks)

    # before PEFT 0.18 there is one orientation
    both = _SWAPPED in Reading(None, type(module), "forward").names
    for swapped in (False, True) if both else (False,):
        given = [torch.randn(5, 12), torch.rand(5, 2)]
        if not proof.Theirs(theirs, _twin(module, swapped), given).agrees(ours):
            return None
    return LoRAExpertsPlan()


def _prove(module: Any, state: State) -> LoRAExpertsPlan | str:
    *wrappers, base = _chain(module)
    plan = base.__dict__.get(plans.marker(ExpertsPlan.kind))
    if not isinstance(plan, ExpertsPlan):
        return f"its base layer, {type(base).__name__}, runs its own code"
    others = {w.parameter_name for w in wrappers} - {plan.first, "down_proj"}
    if others:
        return f"{', '.join(sorted(others))} has an adapter, and is no weight of a product"
    if any(type(w) is not type(module) for w in wrappers):
        return "its wrappers are of different classes"
    return _verdict(module)


SITE = Site(
    options=(LORA,),
    kind=LoRAExpertsPlan.kind,
    candidates=_candidates,
    prove=_prove,
    grows=True,
)
