"""Rotary embedding: the function an attention module calls by a global name, replaced for that module alone.

HF's attention calls `apply_rotary_pos_emb`, a global of its modeling file. To leave every other model in the process
untouched, the attention instance gets its own class' forward code over a copy of those globals in which that one name
is ours. A global assigned to the modeling file later is therefore not seen by a patched attention.
"""

from __future__ import annotations

import functools
import sys
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from liger_kernel.ops import rope as rope_op
from liger_kernel.transformers.patching import proof
from liger_kernel.transformers.patching.state import State


@functools.cache
def prove(original: Callable[..., Any]) -> dict[str, Any] | None:
    """How our `rope` computes what `original(q, k, cos, sin)` does: {"partial": bool, "interleaved": bool}, or None."""
    for interleaved in (False, True):
        if proof.attempt(lambda i=interleaved: _agrees(original, 16, i)):  # type: ignore[misc]
            partial = proof.attempt(lambda i=interleaved: _agrees(original, 8, i))  # type: ignore[misc]
            return {"interleaved": interleaved, "partial": partial}
    return None


def _agrees(original: Callable[..., Any], rotary_dim: int, interleaved: bool) -> bool:
    generator = torch.Generator().manual_seed(0)
    ok = True
    for unsqueeze_dim, shape in ((1, (2, 3, 5, 16)), (2, (2, 5, 3, 16))):
        q, k = (torch.randn(shape, generator=generator) for _ in range(2))
        angles = torch.randn(2, 5, rotary_dim // 2, generator=generator)
        both = angles.repeat_interleave(2, -1) if interleaved else torch.cat((angles, angles), -1)
        cos, sin = both.cos(), both.sin()
        extra = {} if unsqueeze_dim == 1 else {"unsqueeze_dim": 2}
        theirs = proof.run(lambda q, k, c=cos, s=sin, e=extra: original(q, k, c, s, **e), [q, k], [])
        ours = proof.run(
            lambda q, k, c=cos, s=sin, u=unsqueeze_dim: rope_op.rope(q, k, c, s, u, None, interleaved), [q, k], []
        )
        ok = ok and proof.same_function(ours, theirs)
    return ok


@functools.cache
def replacement(original: Callable[..., Any]) -> Callable[..., Any] | None:
    """A function with the signature of `original` that computes the proven call forms by our op, or None."""
    proven = prove(original)
    if proven is None:
        return None
    interleaved, partial = proven["interleaved"], proven["partial"]

    @functools.wraps(original)
    def liger_rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *args: Any, **kwargs: Any) -> Any:
        known = not args and kwargs.keys() <= {"unsqueeze_dim"} and isinstance(k, Tensor) and q.ndim == 4
        whole = partial or cos.shape[-1] == q.shape[-1]
        if not (known and whole and cos.ndim == 3 and not cos.requires_grad):
            return original(q, k, cos, sin, *args, **kwargs)
        return rope_op.rope(q, k, cos, sin, kwargs.get("unsqueeze_dim", 1), None, interleaved)

    return liger_rope


@functools.cache
def _rebound(forward: types.FunctionType) -> types.FunctionType | None:
    """`forward` over globals in which its rotary function is ours; None if it calls none that is proven."""
    overlay = {}
    for name in forward.__code__.co_names:
        original = forward.__globals__.get(name)
        if "rot" in name and callable(original) and not isinstance(original, type):
            ours = replacement(original)
            if ours is not None:
                overlay[name] = ours
    if not overlay:
        return None
    made = types.FunctionType(
        forward.__code__, {**forward.__globals__, **overlay}, forward.__name__, forward.__defaults__, forward.__closure__
    )
    made.__kwdefaults__ = forward.__kwdefaults__
    functools.update_wrapper(made, forward)
    return made


class RopeForward:
    """The forward of one attention module over globals with our rotary function; copies and pickles with its module."""

    def __init__(self, module: nn.Module):
        self.__setstate__({"module": module})

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(self.module, *args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        return {"module": self.module}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.module = state["module"]
        self.function: Any = _rebound(type(self.module).forward)  # type: ignore[arg-type]
        self.__wrapped__ = types.MethodType(type(self.module).forward, self.module)  # for inspect.signature


def _calls_rotary(module: nn.Module) -> types.FunctionType | None:
    forward = getattr(type(module), "forward", None)
    if not isinstance(forward, types.FunctionType) or hasattr(forward, "__wrapped__"):
        return None
    names = [n for n in forward.__code__.co_names if "rot" in n and callable(forward.__globals__.get(n))]
    return forward if names else None


def patch_rope(model: nn.Module, state: State) -> None:
    """Give every attention module of `model` whose rotary function is proven its own forward."""
    for path, module in model.named_modules():
        forward = _calls_rotary(module)
        if forward is None:
            continue
        if "forward" in module.__dict__:
            state.report.add("rope", path, reason="its forward was already replaced")
            continue
        if _rebound(forward) is None:
            state.report.add("rope", path, reason="its rotary function computes something else")
            continue
        state.set(module, "forward", RopeForward(module))
        state.report.add("rope", path, by="liger rope")


def modeling_functions(model_or_class: Any) -> list[tuple[types.ModuleType, str]]:
    """(modeling module, name) of the proven rotary functions in the file that defines a model class."""
    modeling = sys.modules[model_or_class.__module__]
    return [
        (modeling, name)
        for name in ("apply_rotary_pos_emb",)
        if callable(getattr(modeling, name, None)) and prove(getattr(modeling, name)) is not None
    ]
