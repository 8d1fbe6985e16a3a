"""Clones of a decoder layer for a proof: its own forward, with stand-ins for its attention and its MLP."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn

from liger_kernel.transformers.patching import proof
from liger_kernel.transformers.patching.linears import is_inert
from liger_kernel.transformers.patching.waiting import Waiting


class StandIn(nn.Module):
    """A function of the first tensor, alone or with `more` Nones after it; it refuses what is no tensor yet."""

    def __init__(self, scale: float, more: int | None = None):
        super().__init__()
        self.scale, self.more = scale, more

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        given = (*args, *kwargs.values())
        tensors: list[Any] = [v for v in given if isinstance(v, (Tensor, Waiting))]
        if any(type(v) not in (Tensor, nn.Parameter) for v in tensors):
            raise TypeError("a child is given what waits for others")
        y = torch.sin(self.scale * tensors[0])
        return y if self.more is None else (y, *(None,) * self.more)


def twins(module: nn.Module, kept: dict[str, nn.Module]) -> Iterator[nn.Module]:
    """Clones with the children `kept`, whose others return a tuple that starts with a tensor, or a tensor."""
    others = [
        name
        for name, child in module._modules.items()
        if child is not None
        and name not in kept
        and type(child) is not nn.Dropout
        and not is_inert(child)
    ]
    own: dict[str, Tensor | None] = {
        name: p if p is None else nn.Parameter(torch.randn(proof.whole_shape(p)))
        for name, p in module._parameters.items()
    }
    for forms in product((1, 2, None), repeat=len(others)) if len(others) < 5 else ():
        stand_ins = {n: StandIn(1.0 + i, forms[i]) for i, n in enumerate(others)}
        yield proof.clone(module, own, {**stand_ins, **kept})


def parameters(layer: nn.Module) -> list[inspect.Parameter]:
    return list(inspect.signature(type(layer).forward).parameters.values())[1:]


def run(layer: nn.Module, x: Any) -> Any:
    """The first result of the layer's own forward, in which what has no default is None."""
    needed = [
        p.name
        for p in parameters(layer)[1:]
        if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
    ]
    found = type(layer).forward(layer, x, **dict.fromkeys(needed))
    return found[0] if isinstance(found, tuple) else found
