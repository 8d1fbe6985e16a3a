"""Norms: found by shape, told apart by numbers, replaced by an instance `forward`."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from liger_kernel.ops import layer_norm as layer_norm_op
from liger_kernel.ops import rms_norm as rms_norm_op
from liger_kernel.transformers.patching import proof
from liger_kernel.transformers.patching.state import State

PLAN = "_liger_norm"


@dataclass(frozen=True)
class NormPlan:
    """What a norm was proven to compute. `eps` names the attribute that holds it, read at every call."""

    kind: str  # "rms_norm" or "layer_norm"
    eps: str
    offset: float = 0.0
    casting_mode: str = "llama"
    mixed: bool = False  # proven for 16-bit activations with fp32 weights too

    @property
    def label(self) -> str:
        return "LigerRMSNorm" if self.kind == "rms_norm" else "LigerLayerNorm"

    def __str__(self) -> str:
        if self.kind == "layer_norm":
            return self.label
        return (
            f"{self.label}({self.casting_mode}{f', offset={self.offset:g}' if self.offset else ''})"
        )

    def compute(self, module: nn.Module, x: Tensor) -> Tensor:
        eps = getattr(module, self.eps)
        weight = getattr(module, "weight", None)
        if self.kind == "layer_norm":
            return layer_norm_op.layer_norm(x, weight, getattr(module, "bias", None), eps)
        return rms_norm_op.rms_norm(x, weight, eps, self.offset, self.casting_mode)


_plans: dict[Any, NormPlan | None] = {}


def norm_forward(self: nn.Module, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """The forward of a replaced norm; a call form that was not proven goes to the module's own class."""
    plan: NormPlan = self.__dict__[PLAN]
    weight = getattr(self, "weight", None)
    if args or kwargs or not (weight is None or weight.dtype == hidden_states.dtype or plan.mixed):
        return type(self).forward(self, hidden_states, *args, **kwargs)
    return plan.compute(self, hidden_states)


def norm_name(self: nn.Module) -> str:
    return f"{self.__dict__[PLAN].label}[{type(self).__name__}]"


def is_candidate(module: nn.Module) -> bool:
    """A leaf with nothing but a 1-D weight (and bias), or with no parameter and something called eps."""
    if module._modules or module._buffers:
        return False
    parameters = {name: p for name, p in module._parameters.items() if p is not None}
    if not parameters:
        return bool(_eps_names(module))
    return (
        "weight" in parameters
        and parameters.keys() <= {"weight", "bias"}
        and all(len(proof.whole_shape(p)) == 1 for p in parameters.values())
    )


def _eps_names(module: nn.Module) -> list[str]:
    return [
        name
        for name, value in module.__dict__.items()
        if "eps" in name and isinstance(value, float) and 0 < value < 0.1
    ]


def _candidates(module: nn.Module) -> Iterator[NormPlan]:
    has_bias = module._parameters.get("bias") is not None
    for eps in _eps_names(module):
        if not has_bias:
            for mode in ("llama", "gemma"):
                for offset in (0.0, 1.0):
                    yield NormPlan("rms_norm", eps, offset, mode)
        yield NormPlan("layer_norm", eps)


def find_plan(module: nn.Module) -> NormPlan | None:
    """The proven plan for this module, or None."""
    key = (type(module), proof.plain_attributes(module), proof.shapes(module))
    if key not in _plans:
        _plans[key] = next((p for p in _candidates(module) if _proves(module, p)), None)
        plan = _plans[key]
        if plan is not None and _proves_mixed(module, plan):
            _plans[key] = NormPlan(plan.kind, plan.eps, plan.offset, plan.casting_mode, mixed=True)
    return _plans[key]


def _twin(module: nn.Module, dtype: torch.dtype) -> tuple[nn.Module, list[Tensor], int]:
    generator = torch.Generator().manual_seed(0)
    drawn: dict[str, Tensor | None] = {}
    size = 64
    for name, p in module._parameters.items():
        if p is None:
            drawn[name] = None
            continue
        (size,) = proof.whole_shape(p)
        drawn[name] = nn.Parameter((1 + 0.5 * torch.randn(size, generator=generator)).to(dtype))
    return proof.clone(module, drawn, {}), [p for p in drawn.values() if p is not None], size


def _inputs(size: int, dtype: torch.dtype) -> Tensor:
    """Rows from tiny (eps decides) to large."""
    generator = torch.Generator().manual_seed(2)
    scales = torch.tensor([1e-3, 1e-2, 1.0, 30.0]).unsqueeze(1)
    return ((torch.randn(4, size, generator=generator) + 0.3) * scales).to(dtype)


def _proves(module: nn.Module, plan: NormPlan) -> bool:
    def exact() -> bool:
        twin, parameters, size = _twin(module, torch.float32)
        x = _inputs(size, torch.float32)
        theirs = proof.run(partial(type(module).forward, twin), [x], parameters)
        return proof.same_function(proof.run(partial(plan.compute, twin), [x], parameters), theirs)

    return proof.attempt(exact) and proof.attempt(_rounds_alike(module, plan, torch.bfloat16))


def _rounds_alike(module: nn.Module, plan: NormPlan, weights: torch.dtype) -> Callable[[], bool]:
    def check() -> bool:
        twin, _, size = _twin(module, weights)
        x = _inputs(max(size, 1), torch.bfloat16)
        return proof.same_rounding(plan.compute(twin, x), type(module).forward(twin, x))

    return check


def _proves_mixed(module: nn.Module, plan: NormPlan) -> bool:
    return plan.kind == "rms_norm" and proof.attempt(_rounds_alike(module, plan, torch.float32))


def install(module: nn.Module, plan: NormPlan, state: State) -> None:
    state.set(module, PLAN, plan)
    state.set(module, "forward", partial(norm_forward, module))
    state.set(module, "_get_name", partial(norm_name, module))


def patch_norms(model: nn.Module, state: State) -> None:
    """Replace every norm of `model` that is proven to be one of ours."""
    for path, module in model.named_modules():
        if not is_candidate(module):
            continue
        if PLAN in module.__dict__:
            state.report.add(
                "norm", path, by=str(module.__dict__[PLAN])
            )  # by an enclosing or earlier patch
            continue
        if "forward" in module.__dict__:
            state.report.add("norm", path, reason="its forward was already replaced")
            continue
        plan = find_plan(module)
        if plan is None:
            state.report.add(
                "norm", path, reason=f"{type(module).__name__} computes something else"
            )
        elif getattr(state.options, plan.kind):
            install(module, plan, state)
            state.report.add("norm", path, by=str(plan) + _other_forms(module))


def _other_forms(module: nn.Module) -> str:
    """What the report adds where the forward takes more than the hidden states: such calls keep the original."""
    more = list(inspect.signature(type(module).forward).parameters)[2:]
    return f", except with {', '.join(more)}" if more else ""
