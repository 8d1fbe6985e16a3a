"""Gated short convolutions: what lies between the projections is replaced; these stay modules, and are called."""

from __future__ import annotations

import contextlib
import inspect
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from liger_kernel.ops.short_conv import short_conv
from liger_kernel.transformers.patching import proof
from liger_kernel.transformers.patching.linears import is_hooked, maps_features
from liger_kernel.transformers.patching.options import Option
from liger_kernel.transformers.patching.plans import MethodPlan
from liger_kernel.transformers.patching.site import Site, modules

#: arguments that say nothing without a cache
_IDLE = ("cache_position", "num_items_in_batch")


@dataclass(frozen=True)
class ShortConvPlan(MethodPlan):
    """`last(short_conv(first(x)))`, by the names of the children, and of x and its mask among the arguments."""

    kind = "short_conv"

    first: str
    conv: str
    last: str
    x: str
    mask: str = ""  # "": a call with one is HF's

    def __str__(self) -> str:
        return "LigerShortConv"

    def call(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """A cache, indices of packed sequences, and whatever else may change the result are HF's business."""
        given = dict(kwargs) if args else {n: v for n, v in kwargs.items() if n != self.x}
        x, *more = args or (kwargs.get(self.x),)
        mask = given.pop(self.mask, None)
        idle = all(v is None or isinstance(v, bool) or n in _IDLE for n, v in given.items())
        plain = type(x) is Tensor and x.ndim == 3 and not more
        fits = mask is None or (type(mask) is Tensor and mask.shape == x.shape[:2])
        weight, bias = self._taps(module)
        if not (idle and plain and fits) or weight is None:
            return type(module).forward(module, *args, **kwargs)
        return self._compute(module, x, mask, weight, bias)

    def _taps(self, module: nn.Module) -> tuple[Tensor | None, Tensor | None]:
        """None where somebody has to see that they are used."""
        conv = module.__dict__["_modules"][self.conv]
        attributes = conv.__dict__
        own = attributes["_parameters"]
        weight, bias = own.get("weight"), own.get("bias")
        plain = all(type(t) in (nn.Parameter, Tensor) for t in (weight, bias) if t is not None)
        seen = is_hooked(attributes) or "_hf_hook" in attributes or type(conv) is not nn.Conv1d
        if weight is None or weight.ndim != 3 or seen or not plain:
            return None, None
        return weight.squeeze(1), bias

    def compute(self, module: nn.Module, x: Tensor, mask: Tensor | None = None) -> Tensor:
        weight, bias = self._taps(module)
        assert weight is not None
        return self._compute(module, x, mask, weight, bias)

    def _compute(
        self, module: nn.Module, x: Tensor, mask: Tensor | None, weight: Tensor, bias: Tensor | None
    ) -> Tensor:
        children: Any = module.__dict__["_modules"]
        if mask is not None:
            x = (x * mask[:, :, None]).to(x.dtype)
        y: Tensor = children[self.last](short_conv(children[self.first](x), weight, bias))
        return y


def _named(module: nn.Module) -> tuple[str, str, str] | None:
    """The names of the projection to thirds, of the convolution of single channels, and of the last projection."""
    children = {n: c for n, c in module._modules.items() if c is not None}
    convs = [n for n, c in children.items() if type(c) is nn.Conv1d]
    linears = [n for n, c in children.items() if maps_features(c)]
    if (
        len(convs) != 1
        or len(linears) != 2
        or any(p is not None for p in module._parameters.values())
    ):
        return None
    conv: Any = children[convs[0]]
    channels = conv.out_channels
    if conv.groups != channels or proof.whole_shape(conv.weight)[1] != 1:
        return None
    for first, last in (linears, linears[::-1]):
        sizes = children[first].out_features, children[last].in_features
        if sizes == (3 * channels, channels):
            return first, convs[0], last
    return None


def _is_proven(plan: ShortConvPlan, module: nn.Module) -> bool:
    """On a clone of 8 channels; a mask may mean another thing for one sequence than for three."""
    names = (plan.first, plan.conv, plan.last)
    first, conv, last = (module._modules[n] for n in names)
    biases = [getattr(c, "bias", None) is not None for c in (first, conv, last)]
    taps, padding = conv.kernel_size, conv.padding  # type: ignore[union-attr]
    made = (
        nn.Linear(6, 24, biases[0]),
        nn.Conv1d(8, 8, taps, groups=8, bias=biases[1], padding=padding),  # type: ignore[arg-type]
        nn.Linear(8, 5, biases[2]),
    )
    twin = proof.clone(module, {}, dict(zip(names, made, strict=True)))
    for sequences in (3, 1) if plan.mask else (3,):
        mask = torch.arange(9).expand(sequences, 9) > 2 if plan.mask else None
        theirs = partial(type(module).forward, **({plan.mask: mask} if plan.mask else {}))
        found = proof.Theirs(theirs, twin, [2 * torch.randn(sequences, 9, 6)])
        if not found.agrees(partial(plan.compute, mask=mask)):
            return False
    return True


@proof.verdict
def find_plan(module: nn.Module) -> ShortConvPlan | None:
    """The proven plan for this module, or why there is none."""
    names = _named(module)
    assert names is not None
    x, *others = [*inspect.signature(type(module).forward).parameters][1:]
    plan = ShortConvPlan(*names, x)
    if not _is_proven(plan, module):
        return None
    for mask in (n for n in others if "mask" in n):
        with contextlib.suppress(proof.CannotRunAlone):
            if _is_proven(masked := replace(plan, mask=mask), module):
                return masked
    return plan


SITE = Site(
    options=(Option("short_conv", True, "gated short convolutions, as in LFM2."),),
    kind=ShortConvPlan.kind,
    candidates=modules(_named),
    prove=lambda module, state: find_plan(module),
)
