"""MLPs: the gated product or the activation is replaced; the Linears stay modules, so adapters and sharding work."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import product
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from liger_kernel._core.autograd import autocast_dtype
from liger_kernel._core.dtensor import is_dtensor
from liger_kernel.backends.dispatch import is_composed
from liger_kernel.ops import gated_mlp as gated_mlp_op
from liger_kernel.ops import glu as glu_op
from liger_kernel.ops import tiled_mlp as tiled_mlp_op
from liger_kernel.ops.glu.contract import GLUOptions
from liger_kernel.ops.tiled_mlp.tiles import Rerun, in_tiles
from liger_kernel.transformers.patching import facts, proof
from liger_kernel.transformers.patching.linears import (
    drops_nothing,
    is_hooked,
    maps_features,
    matmul_weight,
)
from liger_kernel.transformers.patching.options import LONG, Option
from liger_kernel.transformers.patching.plans import MethodPlan
from liger_kernel.transformers.patching.site import Site, modules
from liger_kernel.transformers.patching.sites import lora
from liger_kernel.transformers.patching.state import State

MLP = Option("mlp", True, "gated MLPs, experts, and squared ReLUs.")
TILED = Option("tiled_mlp", False, "gated MLPs in tiles of tokens, of which backward keeps x.")
ACTIVATIONS = {
    "silu": ("LigerSwiGLU",),
    "gelu_tanh": ("LigerGeGLU",),
    "gelu": ("LigerGeGLU", "erf"),
    "silu_oai": ("LigerSwiGLU", "up + 1"),
    "silu_step": ("LigerSwiGLU", "limit after silu"),
}


@dataclass(frozen=True)
class Gate:
    """What of two projections is the product: options of `glu`."""

    activation: str
    limit: float | None = None
    alpha: float = 1.0

    def named(self, *more: str) -> str:
        """In the report."""
        name, *form = ACTIVATIONS[self.activation]
        form += [f"limit={self.limit:g}"] if self.limit is not None else []
        form += [f"alpha={self.alpha:g}"] if self.alpha != 1 else []
        return f"{name}({', '.join((*form, *more))})" if form or more else name


def gates(numbers: Iterable[float]) -> Iterator[Gate]:
    """Those that a module may have that names `numbers`, the plain ones first."""
    yield from map(Gate, ACTIVATIONS)
    limits = [float(n) for n in numbers if n > 0]
    for limit, alpha in product(limits, dict.fromkeys((1.0, *limits))):
        for activation in ACTIVATIONS:
            if alpha == 1 or not activation.startswith("gelu"):
                yield Gate(activation, limit, alpha)


def far(rows: Tensor) -> Tensor:
    """`rows` up to a ten-thousandfold, so that no limit goes unseen."""
    return rows * torch.logspace(0, 4, len(rows))[:, None]


@dataclass(frozen=True)
class MLPPlan(MethodPlan):
    """`down(act(gate(x)) * up(x))` by the names of the Linears; `up` is None where `gate` holds both, gate first.

    `multipliers` scale what goes into `act` and what comes out of `down`, as in Falcon-H1. `dropouts` drop some of the
    product, and of the result: the name of a child, or the probability.
    """

    kind = "mlp"

    gate: str
    up: str | None
    down: str
    form: Gate
    multipliers: tuple[float, float] = (1.0, 1.0)
    dropouts: tuple[str | float | None, str | float | None] = (None, None)
    up_first: bool = False  # the order in which adapters draw their dropout

    #: in tiles of tokens, where they are many
    tiled: bool = field(default=False, compare=False)

    def __str__(self) -> str:
        form = [] if self.up else ["fused gate_up"]
        return self.form.named(*form, *["tiled"] * self.tiled)

    def compute(self, module: nn.Module, x: Tensor) -> Tensor:
        inner = last = None
        if self.dropouts != (None, None):
            inner, last = (_dropout(module, d) for d in self.dropouts)
        num_tiles = self._num_tiles(module, x) if self.tiled else 1
        whole = self._weights(module, x) if inner is None else None
        form, (into_act, scale) = self.form, self.multipliers
        options = GLUOptions(form.activation, into_act, limit=form.limit, alpha=form.alpha)
        if whole is not None and num_tiles > 1 and autocast_dtype(x) is None:
            y = tiled_mlp_op.gated_tiles(x, *whole, options, num_tiles)
        elif whole is not None and num_tiles == 1:
            # one op, which keeps a third less for backward
            y = gated_mlp_op.gated_mlp(x, *whole, form.activation, into_act, form.limit, form.alpha)
        elif num_tiles > 1:
            y = self._in_tiles(module, x, options, num_tiles, inner)
        else:
            y = self._of_modules(module, x, options, inner)
        y = y if scale == 1 else y * scale
        return y if last is None else last(y)

    def _weights(self, module: nn.Module, x: Tensor) -> tuple[Any, Any, Any] | None:
        """Of gate, up and down, where nothing else is computed."""
        children: Any = module.__dict__["_modules"]
        up = None if self.up is None else children[self.up]
        gate, down = matmul_weight(children[self.gate]), matmul_weight(children[self.down])
        w_up = None if up is None else matmul_weight(up)
        if gate is None or down is None or (up is None) != (w_up is None) or x.dtype != gate.dtype:
            return None
        return gate, w_up, down

    def _of_modules(
        self,
        module: nn.Module,
        x: Tensor,
        options: GLUOptions,
        inner: Callable[[Tensor], Tensor] | None,
        read: bool = True,
    ) -> Tensor:
        """By the Linears, and what is in their place. read: whether somebody reads the numbers."""
        children: Any = module.__dict__["_modules"]
        up = None if self.up is None else children[self.up]
        gate, down = children[self.gate], children[self.down]
        fused = lora.block(x, gate, up, down, options, read) if inner is None else None
        if fused is not None:
            return fused
        ups = up(x) if up is not None and self.up_first else None
        gated = gate(x)
        ups = up(x) if up is not None and not self.up_first else ups
        product = glu_op.gated_product(gated, ups, **options.named())
        y: Tensor = down(product if inner is None else inner(product))
        return y

    def _num_tiles(self, module: nn.Module, x: Tensor) -> int:
        children: Any = module.__dict__["_modules"]
        names = (self.gate, self.up, self.down)
        outputs = sum(children[name].out_features for name in names if name is not None)
        return 1 if is_composed(x) else tiled_mlp_op.tiles_of(x, outputs)

    def _in_tiles(
        self,
        module: nn.Module,
        x: Tensor,
        options: GLUOptions,
        num_tiles: int,
        inner: Callable[[Tensor], Tensor] | None,
    ) -> Tensor:
        """`_of_modules` of each tile."""
        run = partial(self._of_modules, module, options=options, inner=inner)
        if not _may_run_alone(module):
            return tiled_mlp_op.apply_tiled_mlp(lambda _, tile: run(tile), module, x, num_tiles)
        children = module.__dict__["_modules"].items()
        names = (self.gate, self.up, self.down)
        draws = inner is not None or any(lora.draws(c) for n, c in children if n in names)
        block = Rerun(x, run, partial(run, read=False), partial(_trained, module), draws)
        return in_tiles(block, x, num_tiles, _trained(module))


def _trained(module: nn.Module) -> list[Tensor]:
    return [p for p in module.parameters() if p.requires_grad]


def _may_run_alone(module: nn.Module) -> bool:
    """Whether backward may run the block as it is: nobody follows its parts, and gradients may be handed out later."""
    inside = module.modules()
    next(inside)
    return not any(is_hooked(m.__dict__) for m in inside) and all(
        not is_dtensor(p)
        and not hasattr(p, "ds_id")  # of ZeRO-3
        and not (p.requires_grad and (type(p) is not nn.Parameter or p._backward_hooks))
        for p in module.parameters()
    )


def _dropout(module: nn.Module, given: str | float | None) -> Callable[[Tensor], Tensor] | None:
    """What drops now, or whose call somebody has to see."""
    if isinstance(given, float):
        return partial(F.dropout, p=given) if module.training else None
    dropout = None if given is None else module.__dict__["_modules"][given]
    return None if dropout is None or drops_nothing(dropout) else dropout


def _linears(module: nn.Module) -> dict[str, Any]:
    """Children that map features to features."""
    return {name: child for name, child in module._modules.items() if maps_features(child)}


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
    floats = dict.fromkeys((1.0, *facts.numbers(module, float).values()))
    numbers = (*floats, *facts.numbers(module, int).values())
    rest = list(product(map(Gate, ACTIVATIONS), product(floats, floats)))
    rest += [(gate, (1.0, 1.0)) for gate in gates(numbers) if gate.limit is not None]
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


class _Adapted(nn.Linear):
    """A Linear that has to be called, and draws random numbers, as an adapter's does."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.dropout(x))


def _variants(module: nn.Module, plan: MLPPlan) -> Iterator[MLPPlan]:
    """How a plan that holds in evaluation may go on in training, where something drops."""
    names = (n for n, child in module._modules.items() if type(child) is nn.Dropout)
    rates = (v for v in facts.numbers(module, float).values() if 0 < v < 1)
    dropouts = dict.fromkeys((None, *names, *rates))
    orders = (False, True) if plan.up else (False,)
    for both, up_first in product(product(dropouts, dropouts), orders):
        yield replace(plan, dropouts=both, up_first=up_first)


def _theirs(
    module: nn.Module,
    sizes: dict[str, tuple[int, int]],
    features: int,
    linear: type[nn.Linear],
    training: bool,
    spread: Callable[[Tensor], Tensor] = torch.clone,
) -> proof.Theirs:
    """The module's own results in one mode, with small Linears."""
    children: dict[str, nn.Module] = {}
    for name, (n_in, n_out) in sizes.items():
        bias = getattr(module._modules[name], "bias", None) is not None
        children[name] = linear(n_in, n_out, bias=bias)
    twin = proof.clone(module, {}, children)
    x = spread(3 * torch.randn(5, features))
    return proof.Theirs(type(module).forward, twin, [x], modes=[training])


@proof.verdict
def find_plan(module: nn.Module) -> MLPPlan | None:
    """The proven plan for this module, or why there is none."""
    for sizes, plans in _candidates(module):
        theirs = partial(_theirs, module, sizes, sizes[plans[0].gate][0])
        quiet = theirs(nn.Linear, False), theirs(nn.Linear, False, far)
        plan = next((p for p in plans if all(t.agrees(p.compute) for t in quiet)), None)
        if plan is None:
            continue
        loud = theirs(nn.Linear, True), theirs(_Adapted, True)
        for variant in _variants(module, plan):
            if all(theirs.agrees(variant.compute) for theirs in loud):
                return variant
    return None


def _prove(module: nn.Module, state: State) -> MLPPlan | str | None:
    found = find_plan(module)
    if isinstance(found, MLPPlan) and state.options.enabled & {TILED.name, LONG.name}:
        found = replace(found, tiled=True)
    meant = isinstance(found, MLPPlan) or (len(_linears(module)) == 3 and _has_activation(module))
    return found if meant else None


def _has_activation(module: nn.Module) -> bool:
    """Whether three Linears are meant as a gated MLP (and not, say, as query, key and value)."""
    names = {*module._modules, *vars(module)} - _linears(module).keys()
    return any(callable(getattr(module, name)) for name in names if "act" in name)


SITE = Site(
    options=(MLP, TILED),
    kind="mlp",
    candidates=modules(is_candidate),
    prove=_prove,
)
