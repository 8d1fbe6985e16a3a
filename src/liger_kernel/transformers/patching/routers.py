"""Routers of mixtures of experts, proven: for `register_kernels()`. `patch` leaves them alone."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from liger_kernel.ops.moe_router import SCORES, moe_router
from liger_kernel.transformers.patching import facts, proof
from liger_kernel.transformers.patching.plans import MethodPlan


@dataclass(frozen=True)
class RouterPlan(MethodPlan):
    """Logits, weights and indices of the `top_k` experts of each row, by one matrix and one choice."""

    kind = "router"

    top_k: int
    score: str
    normalize: bool
    bias: str | None  # the parameter that is added for the choice
    cap: float | None  # of a tanh around the logits
    wide: bool = False  # logits in fp32, and weights in the dtype of the rows; else both in that of the product

    def compute(self, module: nn.Module, x: Tensor) -> Any:
        weight: Any = module.weight
        x = x.reshape(-1, weight.shape[1])
        logits = F.linear(x, weight)
        if self.wide:
            logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        if self.cap is not None:
            logits = torch.tanh(logits / self.cap) * self.cap
        bias = None if self.bias is None else getattr(module, self.bias)
        weights, index = moe_router(logits, bias, self.top_k, self.score, normalize=self.normalize)
        return logits, weights.to(x.dtype) if self.wide else weights, index


def _plans(module: nn.Module) -> list[RouterPlan]:
    n_experts = len(module.weight)  # type: ignore[arg-type]
    counts = [n for n in dict.fromkeys(facts.numbers(module, int).values()) if 0 < n <= n_experts]
    caps = [n for n in dict.fromkeys(facts.numbers(module, float).values()) if n > 0]
    biases: Any = [n for n in module._parameters if n != "weight"] or [None]
    forms = product(counts, SCORES, (True, False), biases, (None, *caps), (False, True))
    return [RouterPlan(*form) for form in forms]


def _dense(function: Any, module: nn.Module, x: Tensor) -> tuple[Tensor, ...]:
    """The choice as numbers that have a gradient."""
    logits, weights, index = function(module, x)
    return logits, weights, torch.zeros_like(logits, dtype=weights.dtype).scatter(1, index, weights)


@proof.verdict
def find_plan(module: nn.Module) -> RouterPlan | None:
    """The proven plan for this module, or why there is none."""
    shapes = {n: proof.whole_shape(p) for n, p in module._parameters.items() if p is not None}
    if len(shapes.get("weight", ())) != 2 or len(shapes) > 2:
        return None
    randn = partial(torch.randn, generator=torch.Generator().manual_seed(0))
    parameters = {n: nn.Parameter(randn(shape)) for n, shape in shapes.items()}
    parameters["weight"].data /= shapes["weight"][1] ** 0.5
    twin, x = proof.clone(module, dict(parameters), {}), 3 * randn(7, shapes["weight"][1])
    own = partial(_dense, type(module).forward)
    exact = proof.Theirs(own, twin, [x])
    half = proof.clone(module, {n: nn.Parameter(p.bfloat16()) for n, p in parameters.items()}, {})
    rounded = proof.Theirs(own, half, [x.bfloat16()], backward=False)
    dtypes = [t.dtype for t in own(half, x.bfloat16())]
    for plan in _plans(module):
        ours = partial(_dense, plan.compute)
        if not exact.might_agree(ours) or [t.dtype for t in ours(half, x.bfloat16())] != dtypes:
            continue
        if exact.agrees(ours) and rounded.rounds_like(ours):
            return plan
    return None
