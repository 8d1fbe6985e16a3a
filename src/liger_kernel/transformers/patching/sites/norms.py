"""Norms: found by shape, told apart by numbers, replaced by an instance `forward`."""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import chain, product
from typing import Any

import torch
from torch import Tensor, nn

from liger_kernel.ops import glu as glu_op
from liger_kernel.ops import layer_norm as layer_norm_op
from liger_kernel.ops import rms_norm as rms_norm_op
from liger_kernel.transformers.patching import facts, proof, unnormed
from liger_kernel.transformers.patching.options import Option
from liger_kernel.transformers.patching.plans import MethodPlan
from liger_kernel.transformers.patching.site import Site, modules
from liger_kernel.transformers.patching.state import State
from liger_kernel.transformers.patching.sums import Sum


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


@dataclass(frozen=True)
class Gate:
    """The second argument of a norm in linear attention: `norm(x * f(gate))` if `first`, else `norm(x) * f(gate)`."""

    name: str
    activation: str = "silu"
    first: bool = False

    def __str__(self) -> str:
        return f"{'of x' if self.first else 'then'} * {self.activation}({self.name})"

    def apply(self, gate: Tensor, y: Tensor) -> Tensor:
        """The product in fp32, where those models compute it."""
        gate, y = _wide(gate), _wide(y)
        return glu_op.glu(gate, y) if self.activation == "silu" else gate.sigmoid() * y


@dataclass(frozen=True)
class NormPlan(MethodPlan):
    """What a norm was proven to compute."""

    kind = "norm"

    op: str  # "rms_norm" or "layer_norm"
    eps: str | float  # or, where nothing was proven, the attribute that holds it
    offset: float = 0.0
    casting_mode: str = "llama"
    weighted: bool = True
    group_size: int = 0  # rows are cut into groups of so many columns, each normalised by itself
    gate: Gate | None = None
    ungated: bool = True  # proven without a gate, too
    #: dtypes that differ: proven for fp32 weights with 16-bit activations, for 16-bit weights with fp32 activations
    wide_weight: bool = False
    wide_x: bool = False
    unproven: str = ""  # other arguments that the forward takes: such calls are the module's own

    @property
    def forms(self) -> tuple[bool, ...]:
        """The call forms that have to be proven: without a gate, with one."""
        return (False,) * self.ungated + (True,) * (self.gate is not None)

    @property
    def can_wait(self) -> bool:
        """Whether `qk_norm_rope` computes it."""
        return self.op == "rms_norm" and not self.group_size and self.ungated

    @property
    def label(self) -> str:
        return "LigerRMSNorm" if self.op == "rms_norm" else "LigerLayerNorm"

    def __str__(self) -> str:
        details = [
            self.casting_mode if self.op == "rms_norm" else "",
            f"offset={self.offset:g}" if self.offset else "",
            "in groups" if self.group_size else "",
            str(self.gate or ""),
        ]
        text = ", ".join(detail for detail in details if detail)
        but = f", except with {self.unproven}" if self.unproven else ""
        return (f"{self.label}({text})" if text else self.label) + but

    def call(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if len(args) == 1 and not kwargs:
            x, gate = args[0], None
        elif len(args) == 2 and not kwargs:
            x, gate = args
        elif len(args) == 1 and self.gate and kwargs.keys() == {self.gate.name}:
            x, gate = args[0], kwargs[self.gate.name]
        else:
            return type(module).forward(module, *args, **kwargs)
        weight = self._weight(module)
        if not self._takes(weight, x, gate):
            return type(module).forward(module, *args, **kwargs)
        if isinstance(x, Sum):
            if gate is None and self.can_wait:
                return x.normed(weight, self._eps(module), self.offset, self.casting_mode)
            x = x.materialize()
        if gate is None and self.can_wait and unnormed.may_wait(module, x, weight):
            norm = unnormed.Norm(self._eps(module), self.offset, self.casting_mode)
            compute = functools.partial(self.compute, module, x, None, weight)
            return unnormed.Unnormed(norm, module, weight, x, compute)
        return self.compute(module, x, gate, weight)

    def _takes(self, weight: Tensor | None, x: Tensor, gate: Any) -> bool:
        """Whether this is a call of the proven form."""
        if gate is None:
            form = self.ungated
        else:
            form = self.gate is not None and isinstance(gate, Tensor) and gate.shape == x.shape
        if not form or weight is None or weight.dtype == x.dtype:
            return form
        narrow = (x.dtype.itemsize == 2, weight.dtype.itemsize == 2)
        return (self.wide_weight and narrow == (True, False)) or (
            self.wide_x and narrow == (False, True)
        )

    def _weight(self, module: nn.Module) -> Tensor | None:
        return getattr(module, "weight", None) if self.weighted else None

    def compute(
        self,
        module: nn.Module,
        x: Tensor,
        gate: Tensor | None = None,
        weight: Tensor | None = None,
    ) -> Tensor:
        """`weight`: that of the module, if the caller has it already; looking it up takes time."""
        weight = self._weight(module) if weight is None else weight
        gated = self.gate if gate is not None else None
        if gated is None or gate is None:
            return self._norm(module, weight, x)
        if gated.first:
            return self._norm(module, weight, gated.apply(gate, x)).to(x.dtype)
        # a norm that rounds does so before the gate, too
        normed = self._norm(module, weight, x if self.casting_mode == "llama" else _wide(x))
        return gated.apply(gate, normed).to(x.dtype)

    def _eps(self, module: nn.Module) -> float:
        return getattr(module, self.eps) if isinstance(self.eps, str) else self.eps

    def _norm(self, module: nn.Module, weight: Tensor | None, x: Tensor) -> Tensor:
        """In the dtype of x."""
        eps = self._eps(module)
        if self.op == "layer_norm":
            weight = weight + self.offset if weight is not None and self.offset else weight
            return layer_norm_op.layer_norm(x, weight, getattr(module, "bias", None), eps)
        if self.group_size:
            groups = _wide(x).unflatten(-1, (-1, self.group_size))
            normed = rms_norm_op.rms_norm(groups, None, eps).flatten(-2)
            scaled = normed if weight is None else normed * (self.offset + _wide(weight))
            return scaled.to(x.dtype)
        return rms_norm_op.rms_norm(x, weight, eps, self.offset, self.casting_mode)


def is_candidate(module: nn.Module) -> bool:
    """A leaf with nothing but a 1-D weight (and bias), with no parameter and something called eps, or called a norm."""
    if module._modules:
        return False
    if "norm" in type(module).__name__.lower():
        return True
    parameters = {name: p for name, p in module._parameters.items() if p is not None}
    if not parameters:
        return bool(_eps_names(module))
    return (
        "weight" in parameters
        and parameters.keys() <= {"weight", "bias"}
        and all(len(proof.whole_shape(p)) == 1 for p in parameters.values())
    )


def _is_eps(value: Any) -> bool:
    return isinstance(value, float) and 0 < value < 0.1


def _eps_names(module: nn.Module) -> list[str]:
    return [name for name, value in module.__dict__.items() if "eps" in name and _is_eps(value)]


def _more_arguments(module: nn.Module) -> list[inspect.Parameter]:
    """Those besides the hidden states."""
    return list(inspect.signature(type(module).forward).parameters.values())[2:]


def _candidates(module: nn.Module) -> Iterator[NormPlan]:
    size = size_of(module)
    own = {name: p for name, p in module._parameters.items() if p is not None}
    if any(tuple(proof.whole_shape(own[n])) != (size,) for n in ("weight", "bias") if n in own):
        return
    code = getattr(type(module).forward, "__code__", None)
    constants = [c for c in code.co_consts if _is_eps(c)] if code else []
    weighted, has_bias = "weight" in own, "bias" in own
    offsets = (0.0, 1.0) if weighted else (0.0,)
    known = [v for n, v in facts.numbers(module, float).items() if "eps" in n and _is_eps(v)]
    for eps in known or constants:
        if not has_bias:
            for mode in ("llama", "gemma") if weighted else ("llama",):
                for offset in offsets:
                    yield NormPlan("rms_norm", eps, offset, mode, weighted)
        for offset in offsets:
            yield NormPlan("layer_norm", eps, offset, weighted=weighted)
    for group in facts.numbers(module, int).values():
        if weighted and 1 < group < size and size % group == 0:
            for eps, offset in product(known, offsets):
                yield NormPlan("rms_norm", eps, offset, "gemma", group_size=group)


def _gated_candidates(module: nn.Module) -> Iterator[NormPlan]:
    more = _more_arguments(module)
    if len(more) != 1:
        return
    for ungated in (True, False) if more[0].default is None else (False,):
        for plan in _candidates(module):
            for activation, first in product(("silu", "sigmoid"), (False, True)):
                if plan.op == "rms_norm":
                    gate = Gate(more[0].name, activation, first)
                    yield replace(plan, gate=gate, ungated=ungated)


@proof.verdict
def find_plan(module: nn.Module) -> NormPlan | None:
    """The proven plan for this module, or why there is none.

    Equal in fp32, and in bf16 rounded at no more places: of the candidates, those that round most come first.
    """
    theirs = functools.partial(functools.cache(_theirs), module)
    exact: dict[bool, proof.Theirs] = {}
    why: list[proof.CannotRunAlone] = []
    for form in (True, False) if len(_more_arguments(module)) == 1 else (False,):
        try:
            exact[form] = theirs(form, torch.float32, torch.float32, backward=True)
        except proof.CannotRunAlone as error:
            why.append(error)
    if not exact:
        raise why[0]

    def rounds(plan: NormPlan, x: torch.dtype, weights: torch.dtype) -> bool:
        """Whether the plan rounds as the module does, or less, with activations and weights of these dtypes."""
        return all(theirs(form, x, weights).rounds_like(plan.compute) for form in plan.forms)

    def may_mix(plan: NormPlan, x: torch.dtype, weights: torch.dtype) -> bool:
        with contextlib.suppress(proof.CannotRunAlone):
            return plan.op == "rms_norm" and rounds(plan, x, weights)
        return False

    narrow, wide = torch.bfloat16, torch.float32
    for plan in chain(_gated_candidates(module), _candidates(module)):
        same = all(form in exact and exact[form].agrees(plan.compute) for form in plan.forms)
        if same and rounds(plan, narrow, narrow):
            more = [] if plan.gate else [p.name for p in _more_arguments(module)]
            return replace(
                plan,
                wide_weight=may_mix(plan, narrow, wide),
                wide_x=may_mix(plan, wide, narrow),
                unproven=", ".join(more),
            )
    return None


def size_of(module: nn.Module) -> int:
    """How many columns the module normalises."""
    for p in module._parameters.values():
        if p is not None:
            return proof.whole_shape(p)[-1]
    shape = getattr(module, "normalized_shape", None)
    return shape[-1] if isinstance(shape, tuple) and shape else 64


def twin_of(module: nn.Module, dtype: torch.dtype, rounded_to: torch.dtype) -> nn.Module:
    """A clone with random parameters in `dtype`, whose values `rounded_to` holds exactly."""
    generator = torch.Generator().manual_seed(0)
    drawn: dict[str, Tensor | None] = dict(module._parameters)
    for name, p in drawn.items():
        if p is not None:
            values = 1 + 0.5 * torch.randn(proof.whole_shape(p), generator=generator)
            drawn[name] = nn.Parameter(values.to(rounded_to).to(dtype))
    return proof.clone(module, drawn, {})


def _inputs(module: nn.Module, gated: bool, dtype: torch.dtype) -> list[Tensor]:
    """Rows from tiny (eps decides) to large, and a gate if wanted."""
    generator = torch.Generator().manual_seed(2)
    scales = torch.tensor([1e-3, 1e-2, 1.0, 30.0]).view(4, 1, 1)
    shape = (4, 1, size_of(module))
    x = ((torch.randn(shape, generator=generator) + 0.3) * scales).to(dtype)
    return [x, 2 * torch.randn(shape, generator=generator).to(dtype)] if gated else [x]


def _theirs(
    module: nn.Module, gated: bool, x: torch.dtype, weights: torch.dtype, backward: bool = False
) -> proof.Theirs:
    """The module's own results in these dtypes, for values that the narrower of them holds."""
    narrow = min((x, weights), key=lambda dtype: dtype.itemsize)
    inputs = [t.to(x) for t in _inputs(module, gated, narrow)]
    twin = twin_of(module, weights, narrow)
    return proof.Theirs(type(module).forward, twin, inputs, backward)


def _prove(module: nn.Module, state: State) -> NormPlan | str | None:
    found = find_plan(module)
    unwanted = isinstance(found, NormPlan) and found.op not in state.options.enabled
    return None if unwanted else found


SITE = Site(
    options=(
        Option("rms_norm", True, "RMSNorms, with a gate or in groups, too."),
        Option("layer_norm", True, "LayerNorms."),
    ),
    kind="norm",
    candidates=modules(is_candidate),
    prove=_prove,
)
