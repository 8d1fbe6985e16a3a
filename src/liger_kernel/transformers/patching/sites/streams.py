"""Layers with hyper-connections: the streams, and what the layer gives to them, are mixed by one op.

The layer's own forward runs. It is proven on a clone that it meets the sum of the two products, that no other child
gets one of them, and that the layer computes the same.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from liger_kernel._core.autograd import is_transformed
from liger_kernel.transformers.patching import proof, stand_ins, streams
from liger_kernel.transformers.patching.plans import MethodPlan, run_layer
from liger_kernel.transformers.patching.site import Site, modules
from liger_kernel.transformers.patching.sites import hyper_connections as hyper
from liger_kernel.transformers.patching.sites.norms import is_candidate as is_norm
from liger_kernel.transformers.patching.stand_ins import StandIn


@dataclass(frozen=True)
class StreamsPlan(MethodPlan):
    """The layer's own forward, for whose children `connections` sums wait."""

    kind = "streams"

    connections: tuple[str, ...]

    @property
    def label(self) -> str:
        return "LigerStreams"

    def __str__(self) -> str:
        return f"streams mixed behind {', '.join(self.connections)}"

    def call(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if is_transformed():
            return type(module).forward(module, *args, **kwargs)
        children = module.__dict__["_modules"]
        waiting = tuple(children.get(name) for name in self.connections)
        return run_layer(module, partial(streams.run, waiting), *args, **kwargs)


def _connections(module: nn.Module) -> dict[str, hyper.HyperConnectionPlan]:
    """Children that say how streams give to each other."""
    found = {
        name: hyper.find_plan(child)
        for name, child in module._modules.items()
        if child is not None and hyper.is_candidate(child)
    }
    return {
        name: plan
        for name, plan in found.items()
        if isinstance(plan, hyper.HyperConnectionPlan) and plan.steps
    }


def is_candidate(module: nn.Module) -> bool:
    return any(
        child is not None and hyper.is_candidate(child) for child in module._modules.values()
    )


def _run(layer: nn.Module, x: Tensor) -> Tensor:
    first: Tensor = stand_ins.run(layer, x)
    if type(first) is not Tensor:
        raise TypeError("the layer returns what waits")
    return first


def _call(plan: hyper.HyperConnectionPlan, connection: nn.Module, streams: Any) -> Any:
    with proof.of_ours():
        return plan.call(connection, streams)


def _run_mixed(
    layer: nn.Module, x: Tensor, plans: dict[str, hyper.HyperConnectionPlan], sums: list[int]
) -> Tensor:
    """`_run` as the plan has it; notes how many sums were one op."""
    children: Any = layer._modules
    before = streams.running.mixed
    for name, plan in plans.items():
        children[name].__dict__["forward"] = partial(_call, plan, children[name])
    try:
        return streams.run(tuple(children[n] for n in plans), _run, layer, x)
    finally:
        sums.append(streams.running.mixed - before)
        for name in plans:
            del children[name].__dict__["forward"]


@proof.verdict
def find_plan(module: nn.Module) -> StreamsPlan | None:
    """The proven plan for this layer, or why there is none."""
    plans = _connections(module)
    if not plans:
        return None
    n_streams = next(iter(plans.values())).streams
    x = torch.randn(2, 3, n_streams, n_streams + 3)
    children: Any = module._modules
    kept = {n: hyper.twin_of(children[n], n_streams + 3, torch.float32) for n in plans}
    kept |= {n: StandIn(0.5) for n, c in children.items() if c is not None and is_norm(c)}
    for twin in stand_ins.twins(module, kept):
        sums: list[int] = []
        ours = partial(_run_mixed, plans=plans, sums=sums)
        if not proof.ends(_run, twin, x) or not proof.ends(ours, twin, x):
            continue
        # each of its ops is proven; errors of one connection are those of the next, many times over
        if sums[0] == len(plans) and proof.Theirs(_run, twin, [x]).is_computed_by(ours):
            return StreamsPlan(tuple(plans))
    return None


def _prove(module: nn.Module, state: Any) -> StreamsPlan | None:
    """A model around a single connection needs no row that says so."""
    found = find_plan(module)
    return found if isinstance(found, StreamsPlan) else None


SITE = Site(
    options=hyper.SITE.options,
    kind=StreamsPlan.kind,
    candidates=modules(is_candidate),
    prove=_prove,
)
