"""A `torch.autograd.Function` made of a function that is differentiable already."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

from liger_kernel._core.autograd import OwnApply, graph_is_kept, refuse_double_backward


def autograd_function(name: str, call: Callable[..., Any]) -> Any:
    """A subclass of `torch.autograd.Function` whose `apply` is `call`; it belongs to the module of `call`.

    `forward(ctx, ...)` and `backward(ctx, ...)` are for frameworks that subclass it or call both themselves. Any ctx
    will do that takes attributes: forward keeps the graph of `call` there, and backward runs it. backward returns a
    gradient, or None, for each parameter of `call`. `apply` of a subclass is torch's own.
    """
    signature = inspect.signature(call)

    def forward(ctx: Any, *args: Any, **kwargs: Any) -> Any:
        given = signature.bind(*args, **kwargs).arguments
        needs = _needs(ctx, list(given.values()))
        inputs = {
            key: value.detach().requires_grad_(need) if isinstance(value, Tensor) else value
            for (key, value), need in zip(given.items(), needs, strict=True)
        }
        with torch.enable_grad():
            found = call(**inputs)
        outputs = found if isinstance(found, tuple) else (found,)
        ctx.of_forward = inputs, outputs
        alone: Any = tuple(None if output is None else output.detach() for output in outputs)
        if isinstance(ctx, FunctionCtx):
            pairs = zip(alone, outputs, strict=True)
            ctx.mark_non_differentiable(
                *(a for a, o in pairs if a is not None and not _requires_grad(o))
            )
            ctx.set_materialize_grads(False)
        return alone if isinstance(found, tuple) else alone[0]

    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        if isinstance(ctx, FunctionCtx):
            refuse_double_backward()
        if ctx.of_forward is None:
            raise RuntimeError(
                f"A second backward through {name}; pass retain_graph=True to the first."
            )
        inputs, outputs = ctx.of_forward
        kept = graph_is_kept()
        if not kept:
            ctx.of_forward = None
        wanted = {key: value for key, value in inputs.items() if _requires_grad(value)}
        pairs = [
            (output, grad)
            for output, grad in zip(outputs, grads, strict=True)
            if grad is not None and _requires_grad(output)
        ]
        if not pairs:
            return (None,) * len(signature.parameters)
        roots, cotangents = zip(*pairs, strict=True)
        for value in wanted.values():
            value.grad = None
        # as a backward, for the parameters of a module among the arguments
        torch.autograd.backward(roots, cotangents, retain_graph=kept)
        return tuple(wanted[key].grad if key in wanted else None for key in signature.parameters)

    def init_subclass(cls: Any) -> None:
        if "apply" not in vars(cls):
            cls.apply = vars(torch.autograd.Function)["apply"]

    members = {
        "__doc__": call.__doc__,
        "__module__": call.__module__,
        "__init_subclass__": classmethod(init_subclass),
        "apply": staticmethod(call),
        "forward": staticmethod(forward),
        "backward": staticmethod(backward),
    }
    return OwnApply(name, (torch.autograd.Function,), members)


def _requires_grad(value: Any) -> bool:
    return isinstance(value, Tensor) and value.requires_grad


def _needs(ctx: Any, values: list[Any]) -> list[bool]:
    """Which of `values` need a gradient. Where a subclass passes on what it made of its own arguments, ctx speaks of
    those, and `values` made in its forward do not require one: then it is every floating tensor."""
    said = list(getattr(ctx, "needs_input_grad", (True,)))
    if said == [_requires_grad(value) for value in values]:
        return said
    return [any(said) and isinstance(v, Tensor) and v.is_floating_point() for v in values]
