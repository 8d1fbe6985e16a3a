"""Linears with adapters of PEFT (LoRA): what PEFT computes of plain Linears goes into one node.

Which adapters are active, whether they are merged, switched off or dropped from, is looked up in every call. What is no
sum of plain products (DoRA and other variants, quantised or sharded weights, hooks on the Linears) runs PEFT's code.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from liger_kernel._core.autograd import autocast_dtype
from liger_kernel._core.dtensor import is_dtensor
from liger_kernel.backends import host_bound
from liger_kernel.ops import gated_mlp as gated_mlp_op
from liger_kernel.ops import lora_linear as op
from liger_kernel.ops.glu.contract import GLUOptions
from liger_kernel.transformers.patching import plans, proof
from liger_kernel.transformers.patching.facts import Reading, unchanged
from liger_kernel.transformers.patching.linears import (
    drops_nothing,
    maps_features,
    matmul_weight,
    weight_and_bias,
)
from liger_kernel.transformers.patching.options import Option
from liger_kernel.transformers.patching.site import Site, modules
from liger_kernel.transformers.patching.state import State

LORA = Option("lora", True, "Linears with LoRA adapters of PEFT.")
#: elements of x up to which PEFT's code computes on a GPU, as PyTorch's does for a gate four times as wide
#: (`ops/gated_mlp`): there the host is the bound, and of a tiny layer q, k and v took it 551 us in nodes of ours,
#: 425 us in PEFT's ops, the MLP 764 and 487 (one Xeon thread, forward and backward)
_SMALL = 2**21
#: children of PEFT's layer by the name of an adapter
_TABLES = ("lora_A", "lora_B", "lora_dropout")


@dataclass(frozen=True)
class LoRAPlan(plans.MethodPlan):
    """`base_layer(x)` and the products of the active adapters."""

    kind = "lora"

    def __str__(self) -> str:
        return "LoRA in one node"

    def holds(self, module: nn.Module) -> bool:
        """PEFT's class has the code that was proven; the rest is looked up in every call."""
        return not isinstance(_verdict(module), str)

    def compute(self, module: nn.Module, x: Tensor) -> Any:
        found = None if is_dtensor(x) or host_bound(x, _SMALL) else _read(module)
        # another dtype than that of the weight is an error of PyTorch's, unless autocast converts both
        if found is None or (x.dtype != found[0].dtype and autocast_dtype(x) is None):
            return type(module).forward(module, x)
        return op.adapted(x, *found[:2], _adapters(x, found[2]))


Adapters = list[tuple[Tensor, Tensor, float, Any]]
_P = TypeVar("_P", bound=plans.MethodPlan)


def _read(module: Any) -> tuple[Tensor, Tensor | None, Adapters] | None:
    """Weight, bias and active adapters of PEFT's layer; None where it does anything else now."""
    children = module.__dict__["_modules"]
    base = weight_and_bias(children["base_layer"])
    if base is None or module.disable_adapters or module.merged:
        return None
    lora_a, lora_b, dropouts = (children[name].__dict__["_modules"] for name in _TABLES)
    found: Adapters = []
    for name in module.active_adapters:
        if name not in lora_a:
            continue
        a, b = matmul_weight(lora_a[name]), matmul_weight(lora_b[name])
        if a is None or b is None or name in getattr(module, "lora_variant", ()):
            return None
        if not _fit(base[0], a, b, module):
            return None
        dropout = None if drops_nothing(dropouts[name]) else dropouts[name]
        found.append((a, b, module.scaling[name], dropout))
    return (*base, found) if found else None


def _fit(weight: Tensor, a: Tensor, b: Tensor, module: Any) -> bool:
    """Whether the dtypes are those of `lora_linear`, and x is converted to that of the adapter."""
    if a.dtype != b.dtype or torch.promote_types(weight.dtype, a.dtype) != a.dtype:
        return False
    return a.dtype == weight.dtype or getattr(module, "cast_input_dtype_enabled", True)


def _adapters(x: Tensor, found: Adapters) -> list[op.Adapter]:
    """With what each adapter reads: PEFT converts x first, and drops then."""
    return [
        op.Adapter(a, b, scaling, None if dropout is None else dropout(x.to(a.dtype)))
        for a, b, scaling, dropout in found
    ]


def down_of_product(
    down: nn.Module, gate: Tensor, up: Tensor | None, options: GLUOptions
) -> Tensor | None:
    """`down(f(gate) * up)` without keeping the product, where `down` is a Linear with adapters of ours; else None."""
    plan = down.__dict__.get(plans.marker(LoRAPlan.kind))
    if not isinstance(plan, LoRAPlan) or not plans.runs_bare(down, plan):
        return None
    found = _read(down)
    if found is None or any(dropout is not None for *_, dropout in found[2]):
        return None
    if not (gate.requires_grad and torch.is_grad_enabled()) or gate.dtype != found[0].dtype:
        return None
    if host_bound(gate, 4 * _SMALL):
        return None
    product, again = gated_mlp_op.product_to_make_again(gate, up, options)
    return op.adapted(product, *found[:2], _adapters(product, found[2]), again)


def is_candidate(module: nn.Module) -> bool:
    """PEFT's layer around something that maps features."""
    children = module._modules
    return (
        {"base_layer", *_TABLES} <= children.keys()
        and "parameter_name" not in module.__dict__  # its wrappers of parameters
        and maps_features(children["base_layer"])
        and hasattr(module, "active_adapters")
    )


def _twin(module: nn.Module, dropout: Callable[[], nn.Module]) -> nn.Module:
    """A small layer of the same class with two active adapters."""
    ranks = {"a": 3, "b": 5}
    children: dict[str, nn.Module] = {
        "base_layer": nn.Linear(24, 32),
        "lora_A": nn.ModuleDict({n: nn.Linear(24, r, bias=False) for n, r in ranks.items()}),
        "lora_B": nn.ModuleDict({n: nn.Linear(r, 32, bias=False) for n, r in ranks.items()}),
        "lora_dropout": nn.ModuleDict({n: dropout() for n in ranks}),
    }
    twin = proof.clone(module, {}, children)
    twin.__dict__ |= {
        "_disable_adapters": False,
        "_active_adapter": list(ranks),
        "merged_adapters": [],
        "lora_variant": {},
        "scaling": {"a": 0.5, "b": 2.0},
        "cast_input_dtype_enabled": True,
        "in_features": 24,
        "out_features": 32,
    }
    return twin


def verdict_of_class(
    find: Callable[[nn.Module], _P | None],
) -> Callable[[nn.Module], _P | str]:
    """As `proof.verdict`, of the class alone: what an instance holds is looked up in every call."""
    #: class of PEFT -> its code when it was proven, and the verdict
    kept: dict[type, tuple[Reading, _P | str]] = {}

    @functools.wraps(find)
    def found(module: nn.Module) -> _P | str:
        cls = type(module)
        known = kept.get(cls)
        if known is None or not _same(cls, known[0]):
            known = kept[cls] = Reading(None, cls, "forward"), proof.proven(find, module)
        return known[1]

    found.cache_clear = kept.clear  # type: ignore[attr-defined]
    return found


@verdict_of_class
def _verdict(module: nn.Module) -> LoRAPlan | None:
    """The plan, if PEFT's code computes it: with and without dropout, and with adapters in fp32."""
    plan = LoRAPlan()
    forward, compute = type(module).forward, plan.compute
    x = torch.randn(5, 24)
    for dropout in (nn.Identity, partial(nn.Dropout, 0.5)):
        exact = proof.Theirs(forward, _twin(module, dropout), [x])
        mixed = _twin(module, dropout)
        mixed.get_submodule("base_layer").bfloat16()
        rounded = proof.Theirs(forward, mixed, [x.bfloat16()], backward=False)
        if not exact.agrees(compute) or not rounded.rounds_like(compute):
            return None
    return plan


def _same(cls: type, code: Reading) -> bool:
    members = code.members.items()
    return all(getattr(cls, n, None) is v for n, v in members) and unchanged(code.globals)


def _prove(module: Any, state: State) -> LoRAPlan | str:
    base = module._modules["base_layer"]
    if type(base) is not nn.Linear:
        return f"its base layer is a {type(base).__name__}"
    variants = getattr(module, "lora_variant", None) or {}
    if variants:
        return (
            f"{', '.join(sorted({type(v).__name__ for v in variants.values()}))} is no plain LoRA"
        )
    if any(getattr(b, "bias", None) is not None for b in module._modules["lora_B"].children()):
        return "an adapter has a bias"
    return _verdict(module)


SITE = Site(
    options=(LORA,),
    kind=LoRAPlan.kind,
    candidates=modules(is_candidate),
    prove=_prove,
    grows=True,
)
