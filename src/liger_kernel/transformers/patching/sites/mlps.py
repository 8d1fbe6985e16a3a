"""MLPs: the gated product or the activation is replaced; the Linears stay modules, so adapters and sharding work."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn

from liger_kernel.ops import gated_mlp as gated_mlp_op
from liger_kernel.ops import glu as glu_op
from liger_kernel.transformers.patching import proof
from liger_kernel.transformers.patching.linears import matmul_weight
from liger_kernel.transformers.patching.options import Option
from liger_kernel.transformers.patching.plans import MethodPlan
from liger_kernel.transformers.patching.site import Site, modules
from liger_kernel.transformers.patching.state import State

MLP = Option("mlp", True, "gated MLPs, the gates of experts, and squared ReLUs.")
ACTIVATIONS = {"silu": "LigerSwiGLU", "gelu_tanh": "LigerGeGLU", "gelu": "LigerGeGLU(erf)"}


@dataclass(frozen=True)
class MLPPlan(MethodPlan):
    """`down(act(gate(x)) * up(x))` by the names of the Linears; `up` is None where `gate` holds both, gate first.

    `multipliers` are attributes that scale what goes into `act` and what comes out of `down`, as in Falcon-H1.
    """

    kind = "mlp"

    gate: str
    up: str | None
    down: str
    activation: str
    multipliers: tuple[str | None, str | None] = (None, None)

    def __str__(self) -> str:
        return ACTIVATIONS[self.activation] + ("" if self.up else "(fused gate_up)")

    def compute(self, module: nn.Module, x: Tensor) -> Tensor:
        into_act, out = (1.0 if n is None else getattr(module, n) for n in self.multipliers)
        up = None if self.up is None else getattr(module, self.up)
        gate, down = getattr(module, self.gate), getattr(module, self.down)
        w_gate, w_down = matmul_weight(gate), matmul_weight(down)
        w_up = None if up is None else matmul_weight(up)
        whole = (up is None) == (w_up is None)
        if whole and w_gate is not None and w_down is not None and x.dtype == w_gate.dtype:
            # one op, which keeps a third less for backward
            y = gated_mlp_op.gated_mlp(x, w_gate, w_up, w_down, self.activation, into_act)
        else:
            gated = gate(x)  # before up, as in HF: adapters draw their dropout in this order
            ups = None if up is None else up(x)
            y = down(glu_op.gated_product(gated, ups, self.activation, into_act))
        return y if out == 1 else y * out


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
    others = (child for name, child in module._modules.items() if name not in linears and child)
    return all(next(child.parameters(), None) is None for child in others)


def _candidates(module: nn.Module) -> Iterator[tuple[dict[str, tuple[int, int]], list[MLPPlan]]]:
    """Plans that fit the Linears, and small sizes for them that are equal where the real ones are."""
    linears = _linears(module)
    floats = [None, *(n for n, v in proof.hyperparameters(module) if type(v) is float)]
    rest = list(product(ACTIVATIONS, product(floats, floats)))
    for down, last in linears.items():
        others = [name for name in linears if name != down]
        first, inner = linears[others[0]], last.in_features
        width = inner * (3 - len(others))  # of the gate, which may hold both
        shapes = {(linears[name].in_features, linears[name].out_features) for name in others}
        if shapes != {(first.in_features, width)}:
            continue
        small = {inner: 48, width: 48 * (3 - len(others))}
        small.setdefault(first.in_features, 32)
        small.setdefault(last.out_features, 40)
        sizes = {n: (small[c.in_features], small[c.out_features]) for n, c in linears.items()}
        orders = [(others[0], None)] if len(others) == 1 else [tuple(others), tuple(others[::-1])]
        yield sizes, [MLPPlan(gate, up, down, *r) for gate, up in orders for r in rest]


@proof.verdict
def find_plan(module: nn.Module) -> MLPPlan | None:
    """The proven plan for this module, or why there is none."""
    for sizes, plans in _candidates(module):
        torch.default_generator.manual_seed(0)  # not the seeds of other devices
        children: dict[str, Any] = dict(module._modules)
        for name, (n_in, n_out) in sizes.items():
            bias = getattr(getattr(module, name), "bias", None) is not None
            children[name] = nn.Linear(n_in, n_out, bias=bias)
        twin = proof.clone(module, {}, children)
        x = [3 * torch.randn(5, sizes[plans[0].gate][0])]
        theirs = proof.Theirs(type(module).forward, twin, x)
        plan = next((plan for plan in plans if theirs.agrees(plan.compute)), None)
        if plan is not None:
            return plan
    return None


def _prove(module: nn.Module, state: State) -> MLPPlan | str | None:
    found = find_plan(module)
    meant = isinstance(found, MLPPlan) or (len(_linears(module)) == 3 and _has_activation(module))
    return found if meant else None


def _has_activation(module: nn.Module) -> bool:
    """Whether three Linears are meant as a gated MLP (and not, say, as query, key and value)."""
    names = {*module._modules, *vars(module)} - _linears(module).keys()
    return any(callable(getattr(module, name)) for name in names if "act" in name)


SITE = Site(
    options=(MLP,),
    kind="mlp",
    candidates=modules(is_candidate),
    prove=_prove,
)
