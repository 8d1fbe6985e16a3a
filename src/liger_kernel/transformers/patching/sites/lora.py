"""Linears with adapters of PEFT (LoRA): what PEFT computes of plain Linears goes into one node.

Which adapters are active, whether they are merged, switched off or dropped from, is looked up in every call. What is no
sum of plain products (DoRA and other variants, sharded weights, hooks on the Linears) runs PEFT's code.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from liger_kernel.backends import host_bound
from liger_kernel.ops import gated_mlp as gated_mlp_op
from liger_kernel.ops import lora_linear as op
from liger_kernel.ops.glu.contract import GLUOptions
from liger_kernel.transformers.patching import adapters, plans, quantised
from liger_kernel.transformers.patching.adapters import LoRAPlan
from liger_kernel.transformers.patching.linears import weight_and_bias
from liger_kernel.transformers.patching.mixins import without
from liger_kernel.transformers.patching.options import Option
from liger_kernel.transformers.patching.site import Site, modules
from liger_kernel.transformers.patching.state import State

LORA = Option("lora", True, "Linears and embeddings with LoRA adapters of PEFT.")


def down_of_product(
    down: nn.Module, gate: Tensor, up: Tensor | None, options: GLUOptions, read: bool
) -> Tensor | None:
    """`down(f(gate) * up)` without keeping the product, where `down` is a Linear with adapters of ours; else None.

    read: as in `op.adapted`.
    """
    plan = down.__dict__.get(plans.marker(LoRAPlan.kind))
    if not isinstance(plan, LoRAPlan) or not plans.runs_bare(down, plan):
        return None
    found = adapters.read(down, gate)
    if found is None or any(dropout is not None for *_, dropout in found[2]):
        return None
    if not (gate.requires_grad and torch.is_grad_enabled()) or gate.dtype != adapters.dtype_of(
        found[0], gate
    ):
        return None
    if host_bound(gate, 4 * adapters.SMALL):
        return None
    product, again = gated_mlp_op.product_to_make_again(gate, up, options)
    return op.adapted(product, *found[:2], adapters.with_inputs(product, found[2]), again, read)


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
