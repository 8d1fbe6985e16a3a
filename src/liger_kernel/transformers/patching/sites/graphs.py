"""Decoder layers as graphs of the device's work, forward and backward: the host starts a layer by one call.

Last of all sites: what the others made of a layer is captured with it. Nothing has to be proven, since a graph is a
recording of the layer's own kernels; when it may be played back is the business of `patching/graphs.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import nn

from liger_kernel.backends import graphs as device_graphs
from liger_kernel.transformers.patching import plans
from liger_kernel.transformers.patching.graphs import Record
from liger_kernel.transformers.patching.options import Option
from liger_kernel.transformers.patching.plans import MethodPlan, marker
from liger_kernel.transformers.patching.site import Places, Site
from liger_kernel.transformers.patching.sites import residual
from liger_kernel.transformers.patching.sites.residual import ResidualPlan
from liger_kernel.transformers.patching.state import State

_RECORD = "_liger_graphs_of"


@dataclass(frozen=True)
class GraphPlan(MethodPlan):
    """The layer's forward, as it was before, or a graph of it."""

    kind = "graphs"

    def __str__(self) -> str:
        return "CUDA graphs (forms of call that come again)"

    def lost(self, module: nn.Module) -> str | None:
        return module.__dict__[_RECORD].reason or super().lost(module)

    def call(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        record: Record = module.__dict__[_RECORD]
        return record.call(module, partial(_beneath, module), args, kwargs)


def _beneath(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    if marker(ResidualPlan.kind) in module.__dict__:
        return plans.call(module, ResidualPlan.kind, *args, **kwargs)
    return type(module).forward(module, *args, **kwargs)


def _candidates(model: nn.Module) -> Places:
    """Layers that lie in no other layer."""
    within: set[nn.Module] = set()
    for path, module in residual.candidates(model):
        if module not in within:
            within.update(module.modules())
            yield path, module


def _prove(module: nn.Module, state: State) -> GraphPlan | str:
    """Raises: ValueError if no device of this machine has graphs."""
    if not device_graphs.are_here():
        raise ValueError(
            "cuda_graphs=True needs a GPU, and torch sees none here. Leave the option out."
        )
    return GraphPlan()


def _install(module: nn.Module, plan: GraphPlan, state: State) -> None:
    before = next((c for c in state.changes if c.owner is module and c.name == "forward"), None)
    if before is None:
        plans.install(module, plan, state)
    else:  # of ours, around which this one is put
        state.set(module, marker(plan.kind), plan)
        before.value = module.__dict__["forward"] = plans.Method(plans.call, module, plan.kind)
    record = Record()
    state.set(module, _RECORD, record)
    state.handles.append(record)


SITE = Site(
    options=(
        Option(
            "cuda_graphs",
            False,
            "decoder layers as CUDA graphs: for small models and short inputs, where the GPU waits for Python.",
        ),
    ),
    kind=GraphPlan.kind,
    candidates=_candidates,
    prove=_prove,
    install=_install,
    replaces_forward=False,
)
