"""Gated MLPs: only `act(gate) * up` is replaced; the Linears stay modules, so adapters and sharding keep working."""

from __future__ import annotations

import types
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from liger_kernel.ops import glu as glu_op
from liger_kernel.transformers.patching import proof
from liger_kernel.transformers.patching.state import State

PLAN = "_liger_mlp"
ACTIVATIONS = ("silu", "gelu_tanh", "gelu")
_NAMES = {"silu": "SwiGLU", "gelu_tanh": "GeGLU", "gelu": "GeGLU(erf)"}


@dataclass(frozen=True)
class MLPPlan:
    """`down(act(gate(x)) * up(x))` by the names of the Linears; `up` is None where `gate` holds both, gate first."""

    gate: str
    up: str | None
    down: str
    activation: str

    def __str__(self) -> str:
        return f"Liger{_NAMES[self.activation]}{'' if self.up else '(fused gate_up)'}"

    def compute(self, module: nn.Module, x: Tensor) -> Tensor:
        gate = getattr(module, self.gate)(x)
        if self.up is None:
            product = glu_op.glu_packed(gate, self.activation)
        else:
            product = glu_op.glu(gate, getattr(module, self.up)(x), self.activation)
        return getattr(module, self.down)(product)


_plans: dict[Any, MLPPlan | None] = {}


def mlp_forward(self: nn.Module, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    if args or kwargs:
        return type(self).forward(self, x, *args, **kwargs)
    return self.__dict__[PLAN].compute(self, x)


def mlp_name(self: nn.Module) -> str:
    return f"{self.__dict__[PLAN]}[{type(self).__name__}]"


def _linears(module: nn.Module) -> dict[str, Any]:
    """Children that map features to features: Linears, and what adapters and quantisers put in their place."""
    return {
        name: child
        for name, child in module._modules.items()
        if all(isinstance(getattr(child, n, None), int) for n in ("in_features", "out_features"))
    }


def is_candidate(module: nn.Module) -> bool:
    """Two or three Linears and otherwise only children without parameters (the activation, a dropout)."""
    linears = _linears(module)
    if not 2 <= len(linears) <= 3 or any(p is not None for p in module._parameters.values()):
        return False
    others = [
        child
        for name, child in module._modules.items()
        if name not in linears and child is not None
    ]
    return all(next(child.parameters(), None) is None for child in others)


def _candidates(module: nn.Module) -> Iterator[MLPPlan]:
    linears = _linears(module)
    hidden = {name: (child.in_features, child.out_features) for name, child in linears.items()}
    for down in linears:
        others = [name for name in linears if name != down]
        if len(others) == 1 and hidden[others[0]][1] == 2 * hidden[down][0]:
            yield from (MLPPlan(others[0], None, down, a) for a in ACTIVATIONS)
        elif len(others) == 2 and all(hidden[name][1] == hidden[down][0] for name in others):
            for gate, up in (others, others[::-1]):
                yield from (MLPPlan(gate, up, down, a) for a in ACTIVATIONS)


def find_plan(module: nn.Module) -> MLPPlan | None:
    """The proven plan for this module, or None."""
    others = tuple(
        (name, type(child), repr(child))
        for name, child in module._modules.items()
        if name not in _linears(module)
    )
    functions = tuple(
        (n, v) for n, v in module.__dict__.items() if isinstance(v, types.FunctionType)
    )
    linears = tuple((n, getattr(c, "bias", None) is not None) for n, c in _linears(module).items())
    sizes = tuple((c.in_features, c.out_features) for c in _linears(module).values())
    key = (type(module), proof.plain_attributes(module), others, functions, linears, sizes)
    if key not in _plans:
        _plans[key] = next((p for p in _candidates(module) if _proves(module, p)), None)
    return _plans[key]


def _proves(module: nn.Module, plan: MLPPlan) -> bool:
    sizes = {plan.gate: (32, 48 if plan.up else 96), plan.down: (48, 32)}
    if plan.up:
        sizes[plan.up] = (32, 48)

    def exact() -> bool:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            children: dict[str, Any] = dict(module._modules)
            for name, (n_in, n_out) in sizes.items():
                bias = getattr(getattr(module, name), "bias", None) is not None
                children[name] = nn.Linear(n_in, n_out, bias=bias, device="cpu")
            x = 3 * torch.randn(5, 32)
        twin = proof.clone(module, {}, children)
        parameters = [p for name in sizes for p in children[name].parameters()]
        theirs = proof.run(partial(type(module).forward, twin), [x], parameters)
        return proof.same_function(proof.run(partial(plan.compute, twin), [x], parameters), theirs)

    return proof.attempt(exact)


def install(module: nn.Module, plan: MLPPlan, state: State) -> None:
    state.set(module, PLAN, plan)
    state.set(module, "forward", partial(mlp_forward, module))
    state.set(module, "_get_name", partial(mlp_name, module))


def patch_mlps(model: nn.Module, state: State) -> None:
    """Replace the gated product of every MLP of `model` that is proven to be one."""
    for path, module in model.named_modules():
        if not is_candidate(module):
            continue
        if PLAN in module.__dict__:
            state.report.add(
                "mlp", path, by=str(module.__dict__[PLAN])
            )  # by an enclosing or earlier patch
            continue
        if "forward" in module.__dict__:
            state.report.add("mlp", path, reason="its forward was already replaced")
            continue
        plan = find_plan(module)
        if plan is not None:
            install(module, plan, state)
            state.report.add("mlp", path, by=str(plan))
        elif len(_linears(module)) == 3 and _has_activation(module):
            state.report.add("mlp", path, reason=f"{type(module).__name__} computes something else")


def _has_activation(module: nn.Module) -> bool:
    """Whether three Linears are meant as a gated MLP (and not, say, as query, key and value)."""
    names = [
        n for n in (*module._modules, *vars(module)) if "act" in n and n not in _linears(module)
    ]
    return any(callable(getattr(module, name)) for name in names)
