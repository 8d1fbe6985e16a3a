"""The numerical proof that comes before every replacement.

A proof runs the module's own forward and the candidate on a small clone with random weights on the CPU, forward and
backward. It never touches the real weights, and its verdict is kept per class, plain attributes and shapes.
"""

from __future__ import annotations

import types
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from liger_kernel.backends import use_implementation

_HOOKS = (
    "_backward_pre_hooks",
    "_backward_hooks",
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
)


def plain_attributes(module: nn.Module) -> tuple[tuple[str, Any], ...]:
    """The module's own numbers, strings and tuples of them: what its forward may depend on besides shapes."""
    return tuple(
        sorted(
            (name, value)
            for name, value in module.__dict__.items()
            if _is_plain(value) and not name.startswith("_") and name != "layer_idx"
        )
    )


def _is_plain(value: Any) -> bool:
    if isinstance(value, tuple):
        return all(map(_is_plain, value))
    return isinstance(value, (bool, int, float, str))


def key(module: nn.Module) -> Any:
    """What the verdict on a module may depend on: class, plain attributes, functions it holds, shapes, children."""
    return (
        type(module),
        plain_attributes(module),
        tuple((name, value) for name, value in module.__dict__.items() if _is_function(value)),
        tuple((name, tuple(whole_shape(p))) for name, p in module.named_parameters()),
        tuple((name, type(child), repr(child)) for name, child in module._modules.items()),
    )


def _is_function(value: Any) -> bool:
    return isinstance(value, (types.FunctionType, types.BuiltinFunctionType))


def whole_shape(parameter: Tensor) -> torch.Size:
    """The shape of a parameter; under ZeRO-3 the one it has when gathered."""
    return getattr(parameter, "ds_shape", parameter.shape)


def clone(
    module: nn.Module, parameters: dict[str, Tensor | None], children: dict[str, nn.Module]
) -> nn.Module:
    """A module of the same class and plain attributes, without hooks, with other parameters, buffers and children."""
    twin = object.__new__(type(module))
    twin.__dict__.update(module.__dict__)
    twin.__dict__.update({name: OrderedDict() for name in _HOOKS if name in module.__dict__})
    twin.__dict__["_parameters"] = dict(parameters)
    twin.__dict__["_modules"] = dict(children)
    generator = torch.Generator().manual_seed(3)
    twin.__dict__["_buffers"] = {
        name: None if b is None else torch.randn(b.shape, generator=generator).to(b.dtype)
        for name, b in module._buffers.items()
    }
    twin.__dict__.pop("forward", None)
    return twin


def run(
    function: Callable[..., Any], inputs: Sequence[Tensor], parameters: Sequence[Tensor]
) -> list[Tensor]:
    """Outputs, and gradients of inputs and parameters under a fixed cotangent."""
    leaves = [t.detach().clone().requires_grad_(t.is_floating_point()) for t in inputs]
    outputs = function(*leaves)
    outputs = list(outputs) if isinstance(outputs, tuple) else [outputs]
    generator = torch.Generator().manual_seed(1)
    cotangents = [torch.randn(o.shape, generator=generator).to(o.dtype) for o in outputs]
    wanted = [t for t in (*leaves, *parameters) if t.requires_grad]
    grads = torch.autograd.grad(outputs, wanted, cotangents, allow_unused=True)
    return [
        *outputs,
        *(torch.zeros_like(t) if g is None else g for t, g in zip(wanted, grads, strict=True)),
    ]


def same_function(ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> bool:
    """Equal up to the order of fp32 additions: max|difference| within 64 spacings of the largest value."""
    if len(ours) != len(theirs):
        return False
    for a, b in zip(ours, theirs, strict=True):
        if a.shape != b.shape or a.dtype != b.dtype:
            return False
        spacing = torch.finfo(a.dtype).eps * b.abs().max()
        if not bool((a - b).abs().max() <= 64 * spacing):
            return False
    return True


def no_worse(ours: Tensor, theirs: Tensor, exact: Tensor) -> bool:
    """Whether two results of one function round at the same places, or ours is as near to `exact` as theirs.

    The same places: a misplaced rounding moves about every fourth 16-bit element. As near: at the worst and on average.
    """
    if ours.dtype != theirs.dtype or ours.shape != theirs.shape:
        return False
    if ours.dtype.itemsize > 2:
        return same_function([ours], [theirs])
    our_errors, their_errors = ((t.double() - exact.double()).abs() for t in (ours, theirs))
    alike = (ours == theirs).double().mean() > 0.95
    nearer = (our_errors.max() <= their_errors.max()) & (our_errors.mean() <= their_errors.mean())
    return bool(alike | nearer)


def attempt(check: Callable[[], bool]) -> bool:
    """The verdict of `check`, run on the reference implementation; False if the module cannot run this way at all.

    On the CPU in fp32, whatever `from_pretrained` or the caller made the default while the model is being built.
    """
    dtype = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        with (
            use_implementation("reference"),
            torch.inference_mode(False),
            torch.enable_grad(),
            torch.device("cpu"),
            torch.autocast("cpu", enabled=False),
        ):
            return check()
    except Exception:
        # a foreign module that does not even run on the clone is simply not this candidate
        return False
    finally:
        torch.set_default_dtype(dtype)
