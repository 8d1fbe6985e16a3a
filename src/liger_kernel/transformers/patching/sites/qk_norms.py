"""Norms of q and k where an entry point has put our rotary function onto the modeling file.

The attention module is left alone then, unless its norms can leave their work to the rotation.
"""

from __future__ import annotations

from torch import nn

from liger_kernel.transformers.modules.rope import liger_rotary_pos_emb
from liger_kernel.transformers.patching.plans import marker
from liger_kernel.transformers.patching.site import Site, modules
from liger_kernel.transformers.patching.sites import norms, rope
from liger_kernel.transformers.patching.state import State


def _calls_ours(module: nn.Module) -> bool:
    functions = rope.rotary_functions(type(module).forward).values()
    ours = bool(functions) and all(f is liger_rotary_pos_emb for f in functions)
    return ours and marker("rope") not in module.__dict__


def _prove(module: nn.Module, state: State) -> rope.RopePlan | None:
    found = rope.find_plan(module)
    return found if isinstance(found, rope.RopePlan) and found.norms else None


SITE = Site(
    options=norms.SITE.options[:1],
    kind="rope",
    candidates=modules(_calls_ours),
    prove=_prove,
)
