"""Hyper-connections: what leads several residual streams into a layer, and says how its output leads back."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn

from liger_kernel.ops.mhc_mix import mhc_pre
from liger_kernel.ops.mhc_project import mhc_project
from liger_kernel.ops.mhc_sinkhorn import mhc_sinkhorn
from liger_kernel.transformers.patching import facts, proof
from liger_kernel.transformers.patching.linears import is_inert
from liger_kernel.transformers.patching.options import Option
from liger_kernel.transformers.patching.plans import MethodPlan
from liger_kernel.transformers.patching.site import Site, modules


@dataclass(frozen=True)
class HyperConnectionPlan(MethodPlan):
    """Of streams x (B, S, streams, C), by the names of the parameters and of what comes back, in its order.

    mix = fn(x / rms(x)) holds the logits of "pre", then of "post" and "comb" where there are any; each part has its
    scale. "pre" is a sigmoid, and the weight of the streams in "collapsed"; "post" another; "comb" is doubly stochastic
    after `steps` of Sinkhorn's iterations.
    """

    kind = "hyper_connection"

    fn: str
    base: str
    scale: str
    streams: int
    outputs: tuple[str, ...]
    norm_eps: float
    pre_eps: float
    post_eps: float
    post_mult: float
    sinkhorn_eps: float
    steps: int  # 0 without "comb"

    @property
    def label(self) -> str:
        return "LigerHyperConnection"

    def __str__(self) -> str:
        steps = f", {self.steps} Sinkhorn steps" if self.steps else ""
        return f"{self.label}({self.streams} streams{steps})"

    def call(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        x: Any = args[0] if len(args) == 1 and not kwargs else None
        own = module.__dict__["_parameters"]
        given = [x, *(own.get(n) for n in (self.fn, self.base, self.scale))]
        if all(type(t) in (nn.Parameter, Tensor) for t in given):  # a DTensor is HF's
            whole = x.shape[-2:] == (self.streams, own[self.fn].shape[1] // self.streams)
            if x.ndim == 4 and whole:
                return self.compute(module, x)
        return type(module).forward(module, *args, **kwargs)

    def compute(self, module: nn.Module, x: Any) -> Any:
        own = module.__dict__["_parameters"]
        fn, base, scale = own[self.fn], own[self.base], own[self.scale]
        mix = mhc_project(x.flatten(-2), fn.t(), self.norm_eps)
        found = {}
        if self.steps:
            eps = (self.pre_eps, self.sinkhorn_eps)
            pre_scale, post_scale, comb_scale = scale.unbind(0)
            pre, found["post"], found["comb"] = mhc_sinkhorn(
                mix, base, pre_scale, post_scale, comb_scale, self.steps, *eps, self.post_mult
            )
        else:
            parts = mix.unflatten(-1, (-1, self.streams)) * scale.to(mix.dtype)[:, None]
            parts = torch.sigmoid(parts + base.to(mix.dtype).view(-1, self.streams))
            pre, *post = parts.unbind(-2)
            pre = pre + self.pre_eps
            if post:
                found["post"] = self.post_mult * post[0]
        if self.post_eps:
            found["post"] = found["post"] + self.post_eps
        found["collapsed"] = mhc_pre(x, pre)
        outputs = tuple(found[name] for name in self.outputs)
        return outputs if len(outputs) > 1 else outputs[0]


def _named(module: nn.Module) -> tuple[str, str, str, int] | None:
    """The names of fn (M, streams C), base (M,), and one to three scales, for which M is right; and the streams."""
    own = {n: proof.whole_shape(p) for n, p in module._parameters.items() if p is not None}
    matrices = [n for n, shape in own.items() if len(shape) == 2]
    if len(own) != 3 or len(matrices) != 1:
        return None
    (fn,) = matrices
    rows, columns = own[fn]
    scale, base = sorted(own.keys() - {fn}, key=lambda n: own[n].numel())
    parts = own[scale].numel()
    streams = math.isqrt(rows + 1) - 1 if parts == 3 else rows // max(1, parts)
    fit = {1: streams, 2: 2 * streams, 3: streams * (streams + 2)}.get(parts) == rows
    vectors = own[base] == (rows,) and own[scale] == (parts,)
    if not fit or not vectors or streams < 2 or columns % streams:
        return None
    return fn, base, scale, streams


def is_candidate(module: nn.Module) -> bool:
    """Three parameters of fitting shapes, children without any, and one argument."""
    if len(module._parameters) != 3 or not all(c and is_inert(c) for c in module.children()):
        return False
    one = len(inspect.signature(type(module).forward).parameters) == 2
    return one and _named(module) is not None


def _candidates(
    module: nn.Module, named: tuple[str, str, str, int], outputs: tuple[str, ...]
) -> Iterator[HyperConnectionPlan]:
    """Plans with the numbers that the module and its children name."""
    floats = dict.fromkeys(n for m in module.modules() for n in facts.numbers(m, float).values())
    every_eps = [*(n for n in floats if 0 < n < 0.1), 0.0]
    steps = [n for n in facts.numbers(module, int).values() if n > 0] if "comb" in outputs else [0]
    mults = dict.fromkeys(
        (2.0, 1.0, *(n for n in floats if n >= 0.1)) if "post" in outputs else (1.0,)
    )
    for norm_eps, eps, count, mult in product(every_eps, every_eps, dict.fromkeys(steps), mults):
        for pre_eps, post_eps in dict.fromkeys(((eps, 0.0), (eps, eps), (0.0, 0.0))):
            if "post" in outputs or not post_eps:
                yield HyperConnectionPlan(
                    *named, outputs, norm_eps, pre_eps, post_eps, mult, eps, count
                )


def _twin(module: nn.Module, columns: int, dtype: torch.dtype) -> nn.Module:
    """A clone of `columns` in a stream, with random parameters that spread the logits of "comb"."""
    fn, _, scale, streams = _named(module) or ("", "", "", 0)
    generator = torch.Generator().manual_seed(0)
    drawn: dict[str, Tensor | None] = {}
    for name, p in module._parameters.items():
        shape = proof.whole_shape(p) if p is not None else torch.Size()
        shape = torch.Size((shape[0], streams * columns)) if name == fn else shape
        values = torch.randn(shape, generator=generator) + (2.0 if name == scale else 0.0)
        drawn[name] = nn.Parameter(values.to(dtype))
    return proof.clone(module, drawn, {})


@proof.verdict
def find_plan(module: nn.Module) -> HyperConnectionPlan | None:
    """The proven plan for this module, or why there is none: in fp32, and with streams or all in 16 bits."""
    named = _named(module)
    assert named is not None
    streams = named[-1]
    columns = streams + 3  # so that what comes back is known by its shape
    generator = torch.Generator().manual_seed(1)
    sizes = torch.logspace(-3, 1, 6).view(2, 3, 1, 1)  # the eps of the norm decides over small ones
    x = torch.randn(2, 3, streams, columns, generator=generator) * sizes
    forward, wide = type(module).forward, _twin(module, columns, torch.float32)
    exact = proof.Theirs(forward, wide, [x])
    narrow, narrow_x = _twin(module, columns, torch.bfloat16), x.bfloat16()
    pairs = ((wide, narrow_x), (narrow, narrow_x), (narrow, x))
    mixed = [proof.Theirs(forward, twin, [t], backward=False) for twin, t in pairs]
    with torch.no_grad():
        theirs = [_tuple(forward(*pair)) for pair in pairs]
    outputs = tuple(
        "comb" if o.ndim == 4 else "post" if o.shape[-1] == streams else "collapsed"
        for o in theirs[0]
    )
    usual = {1: {"collapsed"}, 2: {"post", "collapsed"}, 3: {"post", "comb", "collapsed"}}
    parts = proof.whole_shape(module._parameters[named[2]])[0]  # type: ignore[arg-type]
    if len(set(outputs)) != len(outputs) or {*outputs} != usual[parts]:
        return None
    for plan in _candidates(module, named, outputs):
        if exact.might_agree(plan.compute) and all(
            run.agrees(plan.compute) for run in (exact, *mixed)
        ):
            ours = [_tuple(plan.compute(*pair)) for pair in pairs]
            same = [[o.dtype for o in found] for found in theirs]
            return plan if [[o.dtype for o in found] for found in ours] == same else None
    return None


def _tuple(found: Any) -> tuple[Tensor, ...]:
    return found if isinstance(found, tuple) else (found,)


SITE = Site(
    options=(Option("hyper_connections", True, "hyper-connections (mHC) of residual streams."),),
    kind=HyperConnectionPlan.kind,
    candidates=modules(is_candidate),
    prove=lambda module, state: find_plan(module),
)
