"""Attention residuals: each token attends, by queries that are parameters, to what blocks of layers made of it."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from liger_kernel._core.autograd import autocast_dtype
from liger_kernel.ops.attn_res import attn_res
from liger_kernel.transformers.patching import facts, proof
from liger_kernel.transformers.patching.linears import is_inert
from liger_kernel.transformers.patching.options import Option
from liger_kernel.transformers.patching.plans import MethodPlan
from liger_kernel.transformers.patching.site import Site, modules
from liger_kernel.transformers.patching.sites.norms import is_candidate as is_norm


@dataclass(frozen=True)
class AttentionResidualPlan(MethodPlan):
    """Of blocks (B, S, N, C) and the present one (B, S, C): keys and values are normed, `queries` is (C,) or (Q, C)."""

    kind = "attention_residual"

    queries: str
    eps: float

    def __str__(self) -> str:
        return "LigerAttentionResidual"

    def call(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        given = (*args, module.__dict__["_parameters"].get(self.queries))
        if len(given) == 3 and all(type(t) in (nn.Parameter, Tensor) for t in given) and not kwargs:
            blocks, present, queries = given
            size = queries.shape[-1]
            whole = blocks.ndim == 4 and (*blocks.shape[:2], size) == present.shape
            if whole and blocks.shape[-1] == size:
                return self.compute(module, blocks, present)
        return type(module).forward(module, *args, **kwargs)

    def compute(self, module: nn.Module, blocks: Any, present: Any = None) -> Any:
        v = torch.cat([blocks, present.unsqueeze(-2)], -2)
        v = v.to(torch.promote_types(v.dtype, torch.float32)).movedim(-2, 0)
        queries = module.__dict__["_parameters"][self.queries]
        size = queries.shape[-1]
        scale = torch.full((size,), size**-0.5, dtype=v.dtype, device=v.device)
        found = (attn_res(v, q, scale, self.eps, True) for q in queries.view(-1, size).unbind())
        return tuple(h.to(autocast_dtype(v) or v.dtype) for h in found)


def _queries(module: nn.Module) -> tuple[str, torch.Size] | None:
    own = [(n, proof.whole_shape(p)) for n, p in module._parameters.items() if p is not None]
    return own[0] if len(own) == 1 and len(own[0][1]) in (1, 2) else None


def is_candidate(module: nn.Module) -> bool:
    """Its queries, a norm without a weight, and two arguments."""
    children = [c for c in module.children() if c is not None]
    if not _queries(module) or len(children) != 1 or not is_inert(children[0]):
        return False
    two = len(inspect.signature(type(module).forward).parameters) == 3
    return two and is_norm(children[0])


@proof.verdict
def find_plan(module: nn.Module) -> AttentionResidualPlan | None:
    """The proven plan for this module, or why there is none: on small blocks, where eps decides, and large ones."""
    name, shape = _queries(module) or ("", torch.Size())
    generator = torch.Generator().manual_seed(1)
    drawn = nn.Parameter(3 * torch.randn(*shape[:-1], 8, generator=generator))
    sizes = torch.logspace(-3, 1, 6).view(2, 3, 1)
    present = torch.randn(2, 3, 8, generator=generator) * sizes
    blocks = torch.randn(2, 3, 4, 8, generator=generator) * sizes.unsqueeze(-1)
    twin = proof.clone(module, {name: drawn}, {})
    every_eps = [*facts.numbers(next(module.children()), float).values(), 0.0]
    runs = [
        proof.Theirs(type(module).forward, twin, [b, p], backward=backward)
        for b, p, backward in (
            (blocks, present, True),
            (
                blocks[:, :, :0],
                present,
                False,
            ),  # the gradient of the queries is 0, in theirs but for rounding
            (blocks.bfloat16(), present.bfloat16(), False),
            (blocks.bfloat16(), present, False),
        )
    ]
    for eps in dict.fromkeys(every_eps):
        plan = AttentionResidualPlan(name, eps)
        if all(theirs.agrees(plan.compute) for theirs in runs):
            return plan
    return None


SITE = Site(
    options=(Option("attention_residuals", True, "attention residuals, as in Inkling-2."),),
    kind=AttentionResidualPlan.kind,
    candidates=modules(is_candidate),
    prove=lambda module, state: find_plan(module),
)
