"""The numerical proof that comes before every replacement.

A proof runs the module's own forward and the candidate on a small clone with random weights on the CPU, forward and
backward. It never touches the real weights, and its verdict is kept per class, plain attributes and shapes.
"""

from __future__ import annotations

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
    """The module's own numbers, strings and activation names: what its forward may depend on besides shapes."""
    return tuple(
        sorted(
            (name, value)
            for name, value in module.__dict__.items()
            if isinstance(value, (bool, int, float, str))
            and not name.startswith("_")
            and name != "layer_idx"
        )
    )


def shapes(module: nn.Module) -> tuple[tuple[str, tuple[int, ...]], ...]:
    return tuple((name, tuple(whole_shape(p))) for name, p in module.named_parameters())


def whole_shape(parameter: Tensor) -> torch.Size:
    """The shape of a parameter; under ZeRO-3 the one it has when gathered."""
    return getattr(parameter, "ds_shape", parameter.shape)


def clone(
    module: nn.Module, parameters: dict[str, Tensor | None], children: dict[str, nn.Module]
) -> nn.Module:
    """A module of the same class and plain attributes, with other parameters and children, and without hooks."""
    twin = object.__new__(type(module))
    twin.__dict__.update(module.__dict__)
    twin.__dict__.update({name: OrderedDict() for name in _HOOKS if name in module.__dict__})
    twin.__dict__["_parameters"] = dict(parameters)
    twin.__dict__["_modules"] = dict(children)
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


def same_rounding(ours: Tensor, theirs: Tensor) -> bool:
    """Whether two 16-bit results round at the same places: a misplaced rounding moves about every fourth element."""
    return ours.dtype == theirs.dtype and bool((ours == theirs).float().mean() > 0.95)


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
