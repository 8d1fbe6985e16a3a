"""MLPs: the gated product or the activation is replaced; the Linears stay modules, so adapters and sharding work."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn

from liger_kernel.ops import gated_mlp as gated_mlp_op
from liger_kernel.ops import glu as glu_op
from liger_kernel.ops import relu_squared as relu_squared_op
from liger_kernel.transformers.patching import proof, walk
from liger_kernel.transformers.patching.linears import plain_weight
from liger_kernel.transformers.patching.state import State

ACTIVATIONS = {"silu": "LigerSwiGLU", "gelu_tanh": "LigerGeGLU", "gelu": "LigerGeGLU(erf)"}


@dataclass(frozen=True)
class MLPPlan(walk.Plan):
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

    def call(self, module: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
        if len(args) != 1 or kwargs:
            return type(module).forward(module, *args, **kwargs)
        return self.compute(module, args[0])

    def compute(self, module: nn.Module, x: Tensor) -> Tensor:
        into_act, out = (1.0 if n is None else getattr(module, n) for n in self.multipliers)
        up = None if self.up is None else getattr(module, self.up)
        gate, down = getattr(module, self.gate), getattr(module, self.down)
        w_gate, w_down = plain_weight(gate), plain_weight(down)
        w_up = None if up is None else plain_weight(up)
        if (
            w_gate is not None
            and w_down is not None
            and (up is None or w_up is not None)
            and x.dtype == w_gate.dtype
        ):  # one op, which keeps a third less for backward
            y = gated_mlp_op.gated_mlp(x, w_gate, w_up, w_down, self.activation, into_act)
        else:
            gated = gate(x)  # before up, as in HF: adapters draw their dropout in this order
            product = glu_op.gated_product(
                gated, None if up is None else up(x), self.activation, into_act
            )
            y = down(product)
        return y if out == 1 else y * out


@dataclass(frozen=True)
class ReLUSquaredPlan(walk.Plan):
    """An activation module that computes `max(x, 0)^2`."""

    kind = "mlp"

    def __str__(self) -> str:
        return "LigerReLUSquared"

    def call(self, module: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
        if len(args) != 1 or kwargs:
            return type(module).forward(module, *args, **kwargs)
        return relu_squared_op.relu_squared(args[0])


_plans: dict[Any, MLPPlan | None] = {}
_squares: dict[Any, bool] = {}


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
    floats = [None, *(n for n, v in proof.plain_attributes(module) if type(v) is float)]
    rest = list(product(ACTIVATIONS, product(floats, floats)))
    for down in linears:
        others = [name for name in linears if name != down]
        if len(others) == 1 and hidden[others[0]][1] == 2 * hidden[down][0]:
            yield from (MLPPlan(others[0], None, down, *r) for r in rest)
        elif len(others) == 2 and all(hidden[name][1] == hidden[down][0] for name in others):
            for gate, up in (others, others[::-1]):
                yield from (MLPPlan(gate, up, down, *r) for r in rest)


def find_plan(module: nn.Module) -> MLPPlan | None:
    """The proven plan for this module, or None."""
    key = proof.key(module)
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


def patch_mlps(model: nn.Module, state: State) -> None:
    """Replace the gated product of every MLP of `model` that is proven to be one, and every squared ReLU."""
    for path, module in walk.untouched(model, state, "mlp", is_candidate):
        plan = find_plan(module)
        if plan is not None:
            walk.install(module, plan, state)
            state.report.add("mlp", path, by=str(plan))
        elif len(_linears(module)) == 3 and _has_activation(module):
            state.report.add("mlp", path, reason=f"{type(module).__name__} computes something else")
    named = {c for m in model.modules() for name, c in m._modules.items() if "act" in name}
    for path, module in walk.untouched(
        model, state, "mlp", lambda m: m in named and is_relu_squared(m)
    ):
        walk.install(module, ReLUSquaredPlan(), state)
        state.report.add("mlp", path, by=str(ReLUSquaredPlan()))


def _has_activation(module: nn.Module) -> bool:
    """Whether three Linears are meant as a gated MLP (and not, say, as query, key and value)."""
    names = [
        n for n in (*module._modules, *vars(module)) if "act" in n and n not in _linears(module)
    ]
    return any(callable(getattr(module, name)) for name in names)


def is_relu_squared(module: nn.Module) -> bool:
    """Whether a module without parameters and children is proven to compute `max(x, 0)^2` of its one argument."""
    if module._modules or module._parameters or module._buffers:
        return False
    if type(module).__module__.startswith("torch.nn."):  # none of them is one
        return False
    key = proof.key(module)
    if key not in _squares:
        _squares[key] = proof.attempt(partial(_squares_positives, module))
    return _squares[key]


def _squares_positives(module: nn.Module) -> bool:
    if len(inspect.signature(type(module).forward).parameters) != 2:
        return False
    x = torch.randn(5, 48, generator=torch.Generator().manual_seed(0))
    theirs = partial(type(module).forward, proof.clone(module, {}, {}))
    return proof.same_function(
        proof.run(relu_squared_op.relu_squared, [x], []), proof.run(theirs, [x], [])
    ) and torch.equal(relu_squared_op.relu_squared(x.bfloat16()), theirs(x.bfloat16()))
