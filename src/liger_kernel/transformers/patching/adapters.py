"""What a layer of PEFT with LoRA adapters computes now, and the proof that its class computes just that."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from liger_kernel._core.autograd import autocast_dtype
from liger_kernel._core.dtensor import is_dtensor
from liger_kernel.backends import host_bound
from liger_kernel.ops import lora_linear as op
from liger_kernel.ops.lora_linear import small
from liger_kernel.ops.lora_linear.small import SMALL
from liger_kernel.transformers.patching import plans, proof, quantised
from liger_kernel.transformers.patching.facts import Reading
from liger_kernel.transformers.patching.linears import (
    drops_nothing,
    maps_features,
    weight_and_bias,
)
from liger_kernel.transformers.patching.mixins import without

#: children of PEFT's layer by the name of an adapter
_TABLES = ("lora_A", "lora_B", "lora_dropout")
#: of a layer in a proof
_STATE = {
    "_disable_adapters": False,
    "merged_adapters": [],
    "lora_variant": {},
    "scaling": {"a": 0.5, "b": 2.0},
    "cast_input_dtype_enabled": True,
}


@dataclass(frozen=True)
class LoRAPlan(plans.MethodPlan):
    """`base_layer(x)` and the products of the active adapters."""

    kind = "lora"

    #: what the frozen weights are called, where they are quantised
    weights: str | None = None

    def __str__(self) -> str:
        return "LoRA in one node" + (f" on {self.weights}" if self.weights else "")

    def holds(self, module: nn.Module) -> bool:
        """PEFT's class has the code that was proven; the rest is looked up in every call."""
        return not isinstance(verdict(module), str)

    def compute(self, module: nn.Module, x: Tensor) -> Any:
        found = None if is_dtensor(x) else read(module, x)
        if found is None or (host_bound(x, SMALL) and not small.serves(x, found)):
            return type(module).forward(module, x)  # in C++: our larger node takes longer there
        return op.adapted(x, *found[:2], with_inputs(x, found[2]))


Adapters = list[tuple[Tensor, Tensor, float, Any]]


def read(module: Any, x: Tensor) -> tuple[Tensor | op.Quantised, Tensor | None, Adapters] | None:
    """Weight, bias and active adapters of PEFT's layer; None where it does anything else now."""
    layer = module.__dict__["_modules"]["base_layer"]
    base = weight_and_bias(layer) or quantised.weight_and_bias(layer)
    if base is None or module.disable_adapters or module.merged:
        return None
    wanted = dtype_of(base[0], x)
    found = None if wanted is None else active(module, wanted)
    return (*base, found) if found else None


def active(module: Any, dtype: torch.dtype) -> Adapters | None:
    """The adapters that add to a result in `dtype`; None where one does more than that."""
    # of every Linear, in every forward: no generators, and nothing by `nn.Module.__getattr__`
    attributes = module.__dict__
    children = attributes["_modules"]
    lora_a = children["lora_A"].__dict__["_modules"]
    lora_b = children["lora_B"].__dict__["_modules"]
    dropouts = children["lora_dropout"].__dict__["_modules"]
    variants, scaling = attributes.get("lora_variant", ()), attributes["scaling"]
    found: Adapters = []
    for name in module.active_adapters:
        if name not in lora_a:
            continue
        of_a, of_b = weight_and_bias(lora_a[name]), weight_and_bias(lora_b[name])
        if of_a is None or of_b is None or name in variants:
            return None
        (a, bias_a), (b, bias_b) = of_a, of_b
        if bias_a is not None or bias_b is not None or not _fit(dtype, a, b, module):
            return None
        dropout = None if drops_nothing(dropouts[name]) else dropouts[name]
        if dropout is not None and getattr(dropout, "inplace", False):  # into what others read
            return None
        found.append((a, b, scaling[name], dropout))
    return found


def dtype_of(weight: Tensor | op.Quantised, x: Tensor) -> torch.dtype | None:
    """What the adapters are given; None where the base computes in another dtype than autocast asks for, or, without
    it, x has another one than a plain weight, which is an error of PyTorch's."""
    autocast = autocast_dtype(x)
    if isinstance(weight, Tensor):
        return weight.dtype if autocast is not None or x.dtype == weight.dtype else None
    if autocast is None:
        return x.dtype
    return autocast if autocast == (weight.dtype or x.dtype) else None


def _fit(dtype: torch.dtype, a: Tensor, b: Tensor, module: Any) -> bool:
    """Whether an adapter has one dtype, to which x is converted."""
    return a.dtype is b.dtype and (
        a.dtype is dtype or getattr(module, "cast_input_dtype_enabled", True)
    )


def with_inputs(x: Tensor, found: Adapters) -> list[op.Adapter]:
    """With what each adapter reads: PEFT converts x first, and drops then."""
    return [
        op.Adapter(a, b, scaling, None if dropout is None else dropout(x.to(a.dtype)))
        for a, b, scaling, dropout in found
    ]


def low_rank(module: Any, hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor] | None:
    """(T, r) and (O, r), whose product the active adapters add to that of `hidden` (T, H) and `weight`; None where they
    do more than that. Of adapters that are off it is nothing, of rank 0.
    """
    off = module.disable_adapters or module.merged
    found = [] if off else active(module, autocast_dtype(hidden) or weight.dtype)
    if found is None:
        return None
    thin = [
        (F.linear(hidden.to(a.dtype) if read is None else read, a) * scaling, b)
        for a, b, scaling, read in with_inputs(hidden, found)
    ]
    if not thin:
        return hidden.new_empty(hidden.shape[0], 0), weight.new_empty(weight.shape[0], 0)
    rows, columns = zip(*thin, strict=True)
    return (rows[0], columns[0]) if len(thin) == 1 else (torch.cat(rows, 1), torch.cat(columns, 1))


def obstacle(module: Any) -> str | None:
    """Why what the adapters of this layer add cannot be added elsewhere; None if it can."""
    if module.disable_adapters and module.merged:
        return "its adapter is merged, and switched off"
    found = no_plain_lora(module) or verdict(module)
    return found if isinstance(found, str) else None


def variant(module: Any) -> str | None:
    """Why it is no plain LoRA."""
    variants = getattr(module, "lora_variant", None) or {}
    names = sorted({type(variant).__name__ for variant in variants.values()})
    return f"{', '.join(names)} is no plain LoRA" if names else None


def no_plain_lora(module: Any) -> str | None:
    """Why not, as far as one can see."""
    reason = variant(module)
    if reason is not None:
        return reason
    if any(getattr(b, "bias", None) is not None for b in module._modules["lora_B"].children()):
        return "an adapter has a bias"
    return None


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
    twin.__dict__ |= {**_STATE, "_active_adapter": list(ranks)}
    twin.__dict__ |= {"in_features": 24, "out_features": 32}
    return twin


_P = TypeVar("_P", bound=plans.MethodPlan)


def verdict_of_class(
    find: Callable[[nn.Module], _P | None],
) -> Callable[[nn.Module], _P | str]:
    """As `proof.verdict`, of the class alone: what an instance holds is looked up in every call."""
    #: class of PEFT, or of ours on top -> that of PEFT, its code when it was proven, and the verdict
    kept: dict[type, tuple[type, Reading, _P | str]] = {}

    @functools.wraps(find)
    def found(module: nn.Module) -> _P | str:
        known = kept.get(type(module))
        if known is None or not known[1].holds(known[0]):
            cls = without(type(module))
            known = cls, Reading(None, cls, "forward"), proof.proven(find, module)
            kept[type(module)] = known
        return known[2]

    found.cache_clear = kept.clear  # type: ignore[attr-defined]
    return found


@verdict_of_class
def verdict(module: nn.Module) -> LoRAPlan | None:
    """The plan, if PEFT's code computes it: with and without dropout, and with adapters in fp32."""
    plan = LoRAPlan()
    forward, compute = without(type(module)).forward, plan.compute
    x = torch.randn(5, 24)
    for dropout in (nn.Identity, partial(nn.Dropout, 0.5)):
        exact = proof.Theirs(forward, _twin(module, dropout), [x])
        mixed = _twin(module, dropout)
        mixed.get_submodule("base_layer").bfloat16()
        rounded = proof.Theirs(forward, mixed, [x.bfloat16()], backward=False)
        if not exact.agrees(compute) or not rounded.agrees(compute):
            return None
    return plan


# -- of an embedding ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LoRAEmbeddingPlan(plans.MethodPlan):
    """`base_layer(ids)`, to which the products of the active adapters are added as they are made."""

    kind = "lora"

    def __str__(self) -> str:
        return "LoRA of an embedding"

    def holds(self, module: nn.Module) -> bool:
        return not isinstance(verdict_of_embedding(module), str)

    def compute(self, module: Any, x: Tensor) -> Any:
        found = self._read(module)
        if found is None or is_dtensor(x) or autocast_dtype(found[0][0]) is not None:
            return type(module).forward(module, x)
        y = module.base_layer(x)
        wide = functools.reduce(torch.promote_types, (a.dtype for a, _, _ in found), y.dtype)
        total = y.reshape(-1, y.shape[-1]).to(wide)
        for a, b, scaling in found:
            rows = module._embed(x, a.t()).reshape(-1, a.shape[0])
            total = torch.addmm(total, rows.to(wide), b.t().to(wide), alpha=scaling)
        return total.to(y.dtype).view(y.shape)

    @staticmethod
    def _read(module: Any) -> list[tuple[Tensor, Tensor, float]] | None:
        """A (r, V), B (H, r) and scaling of the active adapters; None where PEFT's layer does anything else now."""
        scaled = getattr(module, "_get_embed_scale", lambda: None)() is not None
        if module.disable_adapters or module.merged or scaled:
            return None
        tables = module.lora_embedding_A, module.lora_embedding_B
        names = [name for name in module.active_adapters if name in tables[0]]
        if not names or not set(names).isdisjoint(getattr(module, "lora_variant", ())):
            return None
        found = [(*(table[name] for table in tables), module.scaling[name]) for name in names]
        tensors = [module.base_layer.weight, *(t for a, b, _ in found for t in (a, b))]
        plain = all(type(t) in (nn.Parameter, Tensor) for t in tensors)
        return found if plain and all(a.dtype == b.dtype for a, b, _ in found) else None


def is_embedding(module: nn.Module) -> bool:
    """PEFT's layer around an embedding."""
    children = module._modules
    return isinstance(children.get("base_layer"), nn.Embedding) and hasattr(
        module, "lora_embedding_A"
    )


@verdict_of_class
def verdict_of_embedding(module: nn.Module) -> LoRAEmbeddingPlan | None:
    """The plan, if PEFT's code computes it of two adapters, also of adapters wider than the base."""
    plan, forward = LoRAEmbeddingPlan(), type(module).forward
    ids = torch.tensor([[3, 0, 3], [1, 8, 2]])
    ranks = {"a": 3, "b": 5}
    for dtype in (torch.float32, torch.bfloat16):
        children: dict[str, nn.Module] = {
            "base_layer": nn.Embedding(9, 24, padding_idx=0).to(dtype),
            "lora_embedding_A": nn.ParameterDict({n: torch.randn(r, 9) for n, r in ranks.items()}),
            "lora_embedding_B": nn.ParameterDict({n: torch.randn(24, r) for n, r in ranks.items()}),
        }
        twin = proof.clone(module, {}, children)
        twin.__dict__ |= {**_STATE, "_active_adapter": list(ranks)}
        theirs = proof.Theirs(lambda twin: forward(twin, ids), twin, [])
        ours = partial(_call, plan, ids)
        if not (theirs.agrees if dtype == torch.float32 else theirs.rounds_like)(ours):
            return None
    return plan


def _call(plan: plans.MethodPlan, ids: Tensor, twin: nn.Module) -> Any:
    return plan.compute(twin, ids)
