"""The numerical proof that comes before every replacement.

A proof runs the module's own forward and the candidate on a small clone with random weights on the CPU, forward and
backward. It never touches the real weights, and its verdict is kept per class, hyperparameters and shapes.

The module's own code runs first; an error there only means that there can be no proof (`CannotRunAlone`, a row in the
report). Candidates that run have fitting shapes, so an error in one of them is a fault of ours, and is raised.
"""

from __future__ import annotations

import contextlib
import functools
import types
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from liger_kernel._core.tolerance import excess
from liger_kernel.backends import use_implementation
from liger_kernel.transformers.patching.plans import Plan


def hyperparameters(module: nn.Module) -> tuple[tuple[str, Any], ...]:
    """The module's own numbers, strings and tuples of them: what its forward may depend on besides shapes."""
    return tuple(
        sorted(
            (name, value)
            for name, value in module.__dict__.items()
            if _is_hyperparameter(value) and not name.startswith("_") and name != "layer_idx"
        )
    )


def _is_hyperparameter(value: Any) -> bool:
    if isinstance(value, tuple):
        return all(map(_is_hyperparameter, value))
    return isinstance(value, (bool, int, float, str))


def key(module: nn.Module) -> Any:
    """What the verdict on a module may depend on: class, hyperparameters, functions it holds, shapes, children."""
    return (
        type(module),
        hyperparameters(module),
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
    """A module of the same class and hyperparameters, without hooks, with other parameters, buffers and children."""
    twin = object.__new__(type(module))
    twin.__dict__.update(module.__dict__)
    twin.__dict__.update({name: OrderedDict() for name in module.__dict__ if "_hooks" in name})
    twin.__dict__["_parameters"] = dict(parameters)
    twin.__dict__["_modules"] = dict(children)
    generator = torch.Generator().manual_seed(3)
    twin.__dict__["_buffers"] = {
        name: None if b is None else torch.randn(b.shape, generator=generator).to(b.dtype)
        for name, b in module._buffers.items()
    }
    twin.__dict__.pop("forward", None)
    return twin


def _run(
    function: Callable[..., Any], twin: nn.Module, inputs: Sequence[Tensor], backward: bool
) -> list[Tensor]:
    """Outputs, and gradients of inputs and parameters under a fixed cotangent."""
    leaves = [t.detach().clone().requires_grad_() for t in inputs]
    outputs = function(twin, *leaves)
    outputs = list(outputs) if isinstance(outputs, tuple) else [outputs]
    if not backward:
        return outputs
    generator = torch.Generator().manual_seed(1)
    cotangents = [torch.randn(o.shape, generator=generator).to(o.dtype) for o in outputs]
    wanted = [*leaves, *twin.parameters()]
    grads = torch.autograd.grad(outputs, wanted, cotangents, allow_unused=True)
    zeros = (torch.zeros_like(t) if g is None else g for t, g in zip(wanted, grads, strict=True))
    return [*outputs, *zeros]


class CannotRunAlone(Exception):
    """The module's own code failed on its clone; the message says how."""


class Theirs:
    """What `function(twin, *inputs)`, a module's own code, gives: as it is (`low`), and in float64 (`high`)."""

    def __init__(
        self,
        function: Callable[..., Any],
        twin: nn.Module,
        inputs: Sequence[Tensor],
        backward: bool = True,
    ):
        """Raises: CannotRunAlone."""
        self._given = (twin, inputs, backward)
        self._in_float64 = (_widened(twin), [t.double() for t in inputs], backward)
        try:
            self.low = _run(function, *self._given)
            with _InFloat64():
                self.high = _run(function, *self._in_float64)
        except Exception as error:  # foreign code may raise anything
            first, *_ = str(error).splitlines() or [""]
            raise CannotRunAlone(f"{type(error).__name__}: {first[:120]}") from error

    def agrees(self, ours: Callable[..., Any]) -> bool:
        """Whether `ours` is the same function, and the project's rule for numbers holds: for outputs and gradients.

        The rule measures ours by the error of theirs, and would allow all where theirs is random, or differs from its
        own truth in another way. So in float64, where neither has an error, ours has to be that truth.
        """
        return _within(_run(ours, *self._in_float64), self.high, self.high, 2.0) and _within(
            _run(ours, *self._given), self.high, self.low, 2.0
        )

    def rounds_like(self, ours: Callable[..., Any]) -> bool:
        """Whether `ours`, which `agrees`, rounds to 16 bits where theirs does, or at fewer places.

        Stricter than the rule, which leaves room for one rounding more, so that Llama's norm would pass for Gemma's:
        no error is added to theirs but that of fp32 arithmetic.
        """
        return _within(_run(ours, *self._given), self.high, self.low, 1.0)


def _within(
    ours: Sequence[Tensor], high: Sequence[Tensor], low: Sequence[Tensor], factor: float
) -> bool:
    eps = torch.finfo(torch.float32).eps
    return len(ours) == len(low) and all(
        excess(a, b, c, eps=eps, factor=factor) <= 1
        for a, b, c in zip(ours, high, low, strict=True)
    )


class _InFloat64(TorchDispatchMode):
    """What a module converts to float32, whatever it is given, becomes float64: the truth needs no other code."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        named = (kwargs or {}).items()
        return func(*args, **{n: torch.float64 if v is torch.float32 else v for n, v in named})


def _widened(module: nn.Module) -> nn.Module:
    """A copy with its tensors in float64."""

    def wide(value: Any) -> Any:
        if isinstance(value, Tensor) and value.is_floating_point():
            return value.detach().double().requires_grad_(value.requires_grad)
        return value

    twin = object.__new__(type(module))
    twin.__dict__.update({name: wide(value) for name, value in module.__dict__.items()})
    for table in ("_parameters", "_buffers"):
        twin.__dict__[table] = {name: wide(t) for name, t in module.__dict__[table].items()}
    twin.__dict__["_modules"] = {n: c and _widened(c) for n, c in module._modules.items()}
    return twin


@contextlib.contextmanager
def sandbox() -> Iterator[None]:
    """On the CPU in fp32, by the reference; whatever the caller made the default while the model is being built."""
    dtype = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        with (
            use_implementation("reference"),
            torch.inference_mode(False),
            torch.enable_grad(),
            torch.device("cpu"),
            torch.autocast("cpu", enabled=False),
            torch.random.fork_rng(devices=[]),
        ):
            yield
    finally:
        torch.set_default_dtype(dtype)


_P = TypeVar("_P", bound=Plan)


def verdict(find: Callable[[nn.Module], _P | None]) -> Callable[[nn.Module], _P | str]:
    """Makes `find(module)`, run in the sandbox, say why there is no plan; what it says is kept by `key`."""
    kept: dict[Any, _P | str] = {}

    @functools.wraps(find)
    def found(module: nn.Module) -> _P | str:
        at = key(module)
        if at not in kept:
            name = type(module).__name__
            try:
                with sandbox():
                    kept[at] = find(module) or f"{name} computes something else"
            except CannotRunAlone as error:
                kept[at] = f"{name} cannot be run alone: {error}"
        return kept[at]

    found.cache_clear = kept.clear  # type: ignore[attr-defined]
    return found
