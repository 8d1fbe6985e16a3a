"""When the call of a Linear is a matrix product and nothing else, so that an op may multiply by its weight instead."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as _module

_FORWARD = nn.Linear.forward
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_GLOBAL_HOOKS = tuple(getattr(_module, f"_global{name}") for name in _HOOKS)


def matmul_weight(linear: Any) -> Tensor | None:
    """The weight of `linear`; None if its call may do more than multiply by it, or has to be seen by somebody.

    That is so for adapters and quantised layers (classes of their own), for hooks (ZeRO-3, offloading, yours), for
    sharded weights (subclasses of Tensor), for biases, and where `forward` was replaced. Looked at in every call.
    """
    if type(linear) is not nn.Linear or nn.Linear.forward is not _FORWARD:
        return None
    attributes = linear.__dict__
    if "forward" in attributes or any(map(attributes.get, _HOOKS)) or any(_GLOBAL_HOOKS):
        return None
    parameters = attributes["_parameters"]
    weight: Tensor | None = parameters.get("weight")
    if type(weight) not in (nn.Parameter, torch.Tensor) or parameters.get("bias") is not None:
        return None
    return weight
