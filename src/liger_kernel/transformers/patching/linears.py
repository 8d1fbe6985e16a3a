"""When the call of a child may be left out: nobody has to see it, and it does what its class does."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules import module as _module

from liger_kernel.transformers.patching.mixins import made_of

_FORWARDS: dict[Any, Any] = {cls: cls.forward for cls in (nn.Linear, nn.Dropout, nn.Identity)}
_F_LINEAR = F.linear
_OF_TORCH = (nn.Parameter, torch.Tensor)  # sharded and quantised weights are subclasses
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_GLOBAL_HOOKS = tuple(getattr(_module, f"_global{name}") for name in _HOOKS)


def is_hooked(attributes: dict[str, Any]) -> bool:
    """Whether somebody sees the calls of the module that has these attributes."""
    return any(map(attributes.get, _HOOKS)) or any(_GLOBAL_HOOKS)


def _is_plain(module: nn.Module, cls: Any) -> bool:
    """Whether its call is torch's forward and nothing else. That is not so for hooks (ZeRO-3, offloading, yours)."""
    attributes = module.__dict__
    return (
        made_of(type(module)) is cls
        and cls.forward is _FORWARDS[cls]
        and "forward" not in attributes
        and not is_hooked(attributes)
    )


def matmul_weight(linear: Any) -> Tensor | None:
    """The weight of `linear`; None if its call may do more than multiply by it, or has to be seen by somebody.

    That is so for adapters and quantised layers (classes of their own), for hooks, for sharded weights (subclasses of
    Tensor), for biases, and where `forward` was replaced. Looked at in every call.
    """
    found = weight_and_bias(linear)
    return found[0] if found is not None and found[1] is None else None


def weight_and_bias(linear: Any) -> tuple[Tensor, Tensor | None] | None:
    """As `matmul_weight`, of a Linear that may have a bias."""
    attributes = linear.__dict__
    if (  # as `_is_plain`, without the calls: three times in every MLP
        F.linear is not _F_LINEAR
        or type(linear) is not nn.Linear
        or nn.Linear.forward is not _FORWARDS[nn.Linear]
        or "forward" in attributes
        or any(map(attributes.get, _HOOKS))
        or any(_GLOBAL_HOOKS)
    ):
        return None
    parameters = attributes["_parameters"]
    weight, bias = parameters.get("weight"), parameters.get("bias")
    if type(weight) not in _OF_TORCH or (bias is not None and type(bias) not in _OF_TORCH):
        return None
    return weight, bias


def drops_nothing(dropout: Any) -> bool:
    """Whether the call of a dropout, or of what stands in for one, may be left out now."""
    if _is_plain(dropout, nn.Identity):
        return True
    return _is_plain(dropout, nn.Dropout) and not (dropout.training and dropout.p)


def maps_features(child: Any) -> bool:
    """Whether a child is a Linear, or what adapters and quantisers put in its place."""
    return all(isinstance(getattr(child, n, None), int) for n in ("in_features", "out_features"))


def is_inert(child: nn.Module) -> bool:
    """Whether a child computes without parameters, such as an activation: a replacement does not call it."""
    if type(child) is nn.Dropout or maps_features(child):
        return False
    return next(child.parameters(), None) is None


def is_watched(attributes: dict[str, Any]) -> bool:
    """Whether somebody has to see the call of an inert child; ZeRO-3 hooks every module, and has no use for these."""
    if not is_hooked(attributes):
        return False
    hooks = (h for table in (*map(attributes.get, _HOOKS), *_GLOBAL_HOOKS) for h in table.values())
    return any(not str(getattr(h, "__module__", "")).startswith("deepspeed.") for h in hooks)
