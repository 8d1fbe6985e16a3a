"""Experts of a mixture: the whole of what a module does with tokens, their experts' indices and their weights.

transformers (5 and later) runs most of these modules by one function of its registry, named by
`config._experts_implementation`, for which the module's own code is the specification. That is proven, with the weights
in its layout. Routing is the router's business. Our op is in the registry, too, as "liger_kernel": chosen there,
it proves the module before it runs.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn

from liger_kernel._core.autograd import autocast_dtype
from liger_kernel._core.dtensor import is_dtensor
from liger_kernel.ops import fused_moe as moe_op
from liger_kernel.ops.fused_moe.checks import ACTIVATIONS
from liger_kernel.ops.fused_moe.contract import MoEOptions
from liger_kernel.transformers.patching import facts, proof
from liger_kernel.transformers.patching.plans import MethodPlan, marker
from liger_kernel.transformers.patching.site import Site, modules
from liger_kernel.transformers.patching.sites.mlps import MLP, far

NAME = "liger_kernel"
_FIRST, _DOWN = ("gate_up_proj", "up_proj"), "down_proj"
_NAMES = {
    "silu": "SwiGLU",
    "gelu_tanh": "GEGLU",
    "gelu": "GEGLU(erf)",
    "relu_squared": "ReLUSquared",
}
_HIDDEN, _FEATURES = 24, 16  # of the twin that is proven
#: implementations of the registry that compute what the module's own code does
_EQUAL = ("eager", "grouped_mm", "batched_mm", NAME)


@dataclass(frozen=True)
class ExpertsPlan(MethodPlan):
    """The sum of the outputs of K experts of each token, times the router's weights."""

    kind = "experts"

    first: str  # the parameter that makes gate and up, or up alone
    options: MoEOptions

    def __str__(self) -> str:
        o = self.options
        limit = [] if o.limit is None else [f"limit={o.limit:g}"]
        alpha = [] if o.alpha == 1 else [f"alpha={o.alpha:g}"]
        shift = [f"up + {o.up_shift:g}"] if o.up_shift else []
        return f"LigerExperts({', '.join([_NAMES[o.activation], *limit, *alpha, *shift])})"

    def holds(self, module: nn.Module) -> bool:
        return _is_left_to_us(module) and super().holds(module)

    def call(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        given = self.given(module, args, kwargs)
        if given is not None:
            return self.compute(module, *given)
        return type(module).forward(module, *args, **kwargs)

    def given(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> list[Tensor] | None:
        """Tokens, indices and weights of a call; None for a call that was not proven."""
        names = _parameters(type(module).forward)
        found = dict(zip(names, args, strict=False)) | kwargs
        if len(args) + len(kwargs) != 3 or found.keys() != {*names[:3]}:
            return None
        tensors = [found[name] for name in names[:3]]
        return tensors if self._serves(module, *tensors) else None

    def _serves(self, module: nn.Module, x: Tensor, index: Tensor, weights: Tensor) -> bool:
        """Whether they are what was proven: rows of tokens, and plain weights in their dtype."""
        own = [getattr(module, name) for name in (self.first, _DOWN)]
        if getattr(module, "num_experts", len(own[0])) != len(own[0]):  # of all ranks
            return False
        alike = all(w.dtype == x.dtype and w.device == x.device for w in own)
        if autocast_dtype(x) is not None:
            alike = all(w.is_floating_point() and w.element_size() > 1 for w in own)
        plain = not any(map(is_dtensor, (x, index, weights, *own)))
        return plain and alike and x.ndim == index.ndim == 2 and index.shape == weights.shape

    def compute(self, module: nn.Module, x: Tensor, *routed: Tensor, **low_ranks: Any) -> Tensor:
        names = self.first, _DOWN
        weights = [getattr(module, name) for name in names]
        biases = [getattr(module, f"{name}_bias", None) for name in names]
        return moe_op.fused_moe(
            x, *weights, *routed, *biases, **{**self.options.named(), **low_ranks}
        )


@functools.cache
def _parameters(forward: Any) -> list[str]:
    return [*inspect.signature(forward).parameters][1:]


def is_candidate(module: nn.Module) -> bool:
    """What the registry runs, and what else is called experts and holds weights."""
    if hasattr(type(module), "_apply_gate"):
        return True
    named = "expert" in type(module).__name__.lower()
    return named and any(p is not None for p in module._parameters.values())


def _layouts(
    module: nn.Module, first: str
) -> Iterator[tuple[bool, bool, dict[str, tuple[int, ...]]]]:
    """(gated, transposed, small shapes of the parameters), in which its weights can be meant."""
    shapes = {n: proof.whole_shape(p) for n, p in module._parameters.items() if p is not None}
    for gated, transposed in product((True, False), (False, True)):
        w1, w2 = (s[::-1] if transposed else s for s in (shapes[first][1:], shapes[_DOWN][1:]))
        if len(w1) != 2 or w1 != torch.Size(((1 + gated) * w2[1], w2[0])):
            continue
        # perhaps of this rank only, where the weight is that of all
        n_experts, wide = getattr(module, "num_experts", shapes[first][0]), (1 + gated) * _FEATURES
        matrices = {first: (wide, _HIDDEN), _DOWN: (_HIDDEN, _FEATURES)}
        small: dict[str, tuple[int, ...]] = {}
        small |= {n: (n_experts, *(s[::-1] if transposed else s)) for n, s in matrices.items()}
        small.update({f"{n}_bias": (n_experts, s[0]) for n, s in matrices.items()})
        if shapes.keys() <= small.keys() and isinstance(n_experts, int):
            yield gated, transposed, {name: small[name] for name in shapes}


def _plans(module: nn.Module, first: str, gated: bool, transposed: bool) -> Iterator[ExpertsPlan]:
    numbers = dict.fromkeys(facts.numbers(module, float).values())
    limits, alphas = (None, *numbers), dict.fromkeys((1.0, *numbers))
    shifts = (0.0, 1.0) if gated and numbers else (0.0,)
    orders = (False, True) if gated else (False,)
    for limit, alpha, shift, activation, interleaved in product(
        limits, alphas, shifts, ACTIVATIONS, orders
    ):
        if alpha and (limit is None or limit > 0):
            options = MoEOptions(activation, gated, interleaved, transposed, limit, alpha, shift)
            yield ExpertsPlan(first, options)


class _Small:
    """A small twin of an experts module with random weights, tokens and routes."""

    def __init__(self, module: nn.Module, shapes: dict[str, tuple[int, ...]]):
        randn = partial(torch.randn, generator=torch.Generator().manual_seed(0))
        # so large that a limit is met
        parameters = {name: nn.Parameter(0.5 * randn(shape)) for name, shape in shapes.items()}
        self.twin = proof.clone(module, dict(parameters), {})
        n_experts = next(iter(shapes.values()))[0]
        self.index = randn(7, n_experts).topk(min(2, n_experts)).indices
        x, weights = 3 * randn(7, _HIDDEN), randn(self.index.shape).abs()
        self.inputs = [x, weights], [far(x), weights]

    def theirs(self, function: Any) -> list[proof.Theirs]:
        """Of usual tokens, and of so large ones that no limit goes unseen."""
        return [proof.Theirs(self.routed(function), self.twin, given) for given in self.inputs]

    def routed(self, function: Any) -> Callable[..., Any]:
        return lambda twin, x, weights: function(twin, x, self.index, weights)


@proof.verdict
def _find_plan(module: nn.Module) -> ExpertsPlan | None:
    first = next((n for n in _FIRST if n in module._parameters), _FIRST[0])
    forward = type(module).forward
    own = getattr(forward, "__wrapped__", forward)
    others = [] if own is forward else [_registry()["batched_mm"]]
    for gated, transposed, shapes in _layouts(module, first):
        small = _Small(module, shapes)
        theirs = small.theirs(own)
        for plan in _plans(module, first, gated, transposed):
            ours = small.routed(plan.compute)
            if not theirs[0].might_agree(ours) or not all(t.agrees(ours) for t in theirs):
                continue
            # roundings were judged beside its own forward: of few rows an expert, a second time is a matter of luck
            if all(t.is_computed_by(ours) for f in others for t in small.theirs(f)):
                return plan
    return None


def find_plan(module: nn.Module) -> ExpertsPlan | str:
    """The proven plan for this module, or why there is none.

    Where only the registry reads the config, the facts are without it, and `holds` looks at what the registry reads: to
    compare a whole config takes 0.3 ms, at every call of every layer. They are without the number of experts, too,
    which transformers changes when it spreads them over ranks.
    """
    found = _find_plan(module)
    if isinstance(found, str):
        return found
    known: Any = found.facts
    free = {"num_experts"} if _reads_config(type(module)) else {"num_experts", "config"}
    parts = (
        replace(
            part,
            plain=tuple(fact for fact in part.plain if fact[0] not in free),
            pinned=tuple(fact for fact in part.pinned if fact[0] not in free),
        )
        for part in known.parts
    )
    return replace(found, facts=facts.Facts(find_plan, tuple(parts)))


find_plan.cache_clear = _find_plan.cache_clear  # type: ignore[attr-defined]


def _reads_config(cls: Any) -> bool:
    own = getattr(cls.forward, "__wrapped__", None)
    return own is None or "config" in facts.Reading(own, cls, "_apply_gate").names


def _registry() -> Any:
    try:
        from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
    except ImportError:  # an older release
        return {}
    return ALL_EXPERTS_FUNCTIONS


def register_experts() -> None:
    """Make `model.set_experts_implementation("liger_kernel")` known to transformers, for models that are not patched.

    Every experts module is proven at its first call. Raises: ImportError if transformers has no registry of experts.
    """
    if not _registry():
        raise ImportError(
            "This release of transformers has no registry of experts; transformers>=5 has."
        )
    _registry().register(NAME, experts_forward)


def experts_forward(
    self: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """What the registry calls for "liger_kernel". Raises: ValueError for a module that is not proven."""
    key = marker("registered")
    plan = vars(self).get(key)
    if plan is None or not plan.holds(self):
        plan = found_here(self)
        if isinstance(plan, str):
            raise ValueError(f"{plan}. Use model.set_experts_implementation('grouped_mm').")
        vars(self)[key] = plan
    found: Tensor = plan.compute(self, hidden_states, top_k_index, top_k_weights)
    return found


def found_here(module: nn.Module) -> ExpertsPlan | str:
    """`find_plan` for any module, with the reasons to leave it alone."""
    return _left_alone(module) or find_plan(module)


def _left_alone(module: nn.Module) -> str | None:
    """Why an experts module is none that could be proven, if so."""
    name, parameters = type(module).__name__, module._parameters
    weights = parameters.get(_DOWN), *(parameters[n] for n in _FIRST if n in parameters)
    fit = len(weights) == 2 and all(
        w is not None and len(proof.whole_shape(w)) == 3 for w in weights
    )
    if not fit or len(_parameters(type(module).forward)) < 3:
        return f"{name} is not run by transformers' experts registry"
    if not _is_left_to_us(module):
        chosen = module.config._experts_implementation  # type: ignore[union-attr]
        return (
            f"its config asks for {chosen!r}; set_experts_implementation('eager') leaves it to us"
        )
    return None


def _is_left_to_us(module: nn.Module) -> bool:
    """Whether the config names no implementation but those that compute what the module's own code does."""
    if not hasattr(type(module).forward, "__wrapped__"):
        return True
    chosen = getattr(module.__dict__.get("config"), "_experts_implementation", None)
    if chosen is None or chosen not in _EQUAL:
        return chosen is None
    # of a function that the user has registered by that name nothing is known
    home = getattr(_registry().get(chosen), "__module__", __name__)
    return home.startswith(("transformers.", "liger_kernel."))


SITE = Site(
    options=(MLP,),
    kind="experts",
    candidates=modules(is_candidate),
    prove=lambda module, state: found_here(module),
)
