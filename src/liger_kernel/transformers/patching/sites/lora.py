"""Linears with adapters of PEFT (LoRA): what PEFT computes of plain Linears goes into one node.

Which adapters are active, whether they are merged, switched off or dropped from, is looked up in every call. What is no
sum of plain products (DoRA and other variants, sharded weights, hooks on the Linears) runs PEFT's code.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from liger_kernel.backends.dispatch import is_composed
from liger_kernel.ops import lora_mlp
from liger_kernel.ops.glu.contract import GLUOptions
from liger_kernel.transformers.patching import adapters, plans, quantised
from liger_kernel.transformers.patching.adapters import LoRAPlan
from liger_kernel.transformers.patching.linears import weight_and_bias
from liger_kernel.transformers.patching.mixins import without
from liger_kernel.transformers.patching.options import Option
from liger_kernel.transformers.patching.site import Site, modules
from liger_kernel.transformers.patching.state import State

LORA = Option("lora", True, "Linears and embeddings with LoRA adapters of PEFT.")


def block(
    x: Tensor,
    gate: nn.Module,
    up: nn.Module | None,
    down: nn.Module,
    options: GLUOptions,
    read: bool,
) -> Tensor | None:
    """`down(f(gate(x)) * up(x))` of Linears with adapters of ours as one op, where nothing is dropped; else None.

    read: as in `lora_mlp.adapted`.
    """
    first, last = _layer(gate, x), _layer(down, x)
    second = None if up is None else _layer(up, x)
    if first is None or last is None or (up is not None and second is None) or is_composed(x):
        return None
    if not lora_mlp.is_served(x, first, second, last):
        return None
    return lora_mlp.adapted(x, first, second, last, options, read)


def _layer(linear: nn.Module, x: Tensor) -> lora_mlp.Layer | None:
    """A Linear with whatever adapters it has now; None where it, or somebody who watches it, has to be called."""
    plan = linear.__dict__.get(plans.marker(LoRAPlan.kind))
    if not isinstance(plan, LoRAPlan):
        plain = weight_and_bias(linear)
        return None if plain is None else lora_mlp.Layer(*plain)
    found = adapters.read(linear, x) if plans.runs_bare(linear, plan) else None
    if found is None or any(dropout is not None for *_, dropout in found[2]):
        return None
    return lora_mlp.Layer(*found[:2], adapters.with_inputs(x, found[2]))


def draws(linear: nn.Module) -> bool:
    """Whether a call of `linear` may draw random numbers: it is neither plain nor an adapter that drops nothing."""
    if weight_and_bias(linear) is not None:
        return False
    plan = linear.__dict__.get(plans.marker(LoRAPlan.kind))
    plain = isinstance(plan, LoRAPlan) and plan.holds(linear)
    found = adapters.active(linear, torch.float32) if plain else None
    return found is None or any(dropout is not None for *_, dropout in found)


def _prove(module: Any, state: State) -> plans.MethodPlan | str:
    if adapters.is_embedding(module):
        found: plans.MethodPlan | str = adapters.variant(module) or adapters.verdict_of_embedding(
            module
        )
        return found
    base = module._modules["base_layer"]
    weights = quantised.name(base)
    reason = None
    if weights is not None:
        reason = quantised.reason(base)
    elif without(type(base)) is not nn.Linear:
        reason = f"its base layer is a {type(base).__name__}"
    reason = reason or adapters.no_plain_lora(module)
    found = reason or adapters.verdict(module)
    return found if isinstance(found, str) else replace(found, weights=weights)


SITE = Site(
    options=(LORA,),
    kind=LoRAPlan.kind,
    candidates=modules(lambda m: adapters.is_candidate(m) or adapters.is_embedding(m)),
    prove=_prove,
    grows=True,
)
