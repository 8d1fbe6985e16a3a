"""The numerical proof that comes before every replacement.

A proof runs the module's own forward and the candidate on a small clone with random weights on the CPU, forward and
backward. It never touches the real weights, and its verdict is kept per class, hyperparameters and shapes.

The module's own code runs first; an error there only means that there can be no proof (`CannotRunAlone`, a row in the
report). Candidates that run have fitting shapes, so an error in one of them is a fault of ours, and is raised.
"""

from __future__ import annotations

import collections
import contextlib
import copy
import functools
import math
import random
import sys
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from liger_kernel._core.tolerance import excess
from liger_kernel.backends import use_implementation
from liger_kernel.transformers.patching.facts import Facts, Part, is_equal, parts_of
from liger_kernel.transformers.patching.linears import is_inert, maps_features
from liger_kernel.transformers.patching.mixins import without
from liger_kernel.transformers.patching.plans import MethodPlan


def whole_shape(parameter: Tensor) -> torch.Size:
    """The shape of a parameter; under ZeRO-3 the one it has when gathered."""
    return getattr(parameter, "ds_shape", parameter.shape)


def _shapes(module: nn.Module) -> Any:
    """Those of parameters and Linears: what a plan depends on besides facts."""
    linears = ((n, c) for n, c in module._modules.items() if c is not None and maps_features(c))
    return (
        [(name, tuple(whole_shape(p))) for name, p in module.named_parameters()],
        [(n, c.in_features, c.out_features, getattr(c, "bias", None) is None) for n, c in linears],
    )


def clone(
    module: nn.Module, parameters: dict[str, Tensor | None], children: dict[str, nn.Module]
) -> nn.Module:
    """A module of the same class and attributes, without hooks and buffers, with other parameters and children.

    Children without parameters are cloned. Dropouts drop a half: a plan calls them, so they may drop any part.
    """
    twin = object.__new__(type(module))
    twin.__dict__.update({name: _copied(value) for name, value in module.__dict__.items()})
    twin.__dict__.update({name: OrderedDict() for name in module.__dict__ if "_hooks" in name})
    twin.__dict__["_parameters"] = dict(parameters)
    twin.__dict__["_buffers"] = {}
    twin.__dict__["_modules"] = {
        name: children[name] if name in children else child and clone(child, {}, {})
        for name, child in module._modules.items()
        if name in children or child is None or type(child) is nn.Dropout or is_inert(child)
    }
    if type(module) is nn.Dropout:
        twin.__dict__["p"] = 0.5
    twin.__dict__.pop("forward", None)
    if "gradient_checkpointing" in twin.__dict__:
        twin.__dict__["gradient_checkpointing"] = False
    return twin


def _copied(value: Any) -> Any:
    return copy.copy(value) if isinstance(value, (dict, list, set)) else value


def _random_states() -> tuple[Any, ...]:
    """Those of the CPU: of torch, of Python, of numpy. A proof uses no other device."""
    numpy = sys.modules.get("numpy")
    return torch.get_rng_state(), random.getstate(), numpy and numpy.random.get_state()


def _restore(states: tuple[Any, ...]) -> None:
    torch.set_rng_state(states[0])
    random.setstate(states[1])
    if states[2]:
        sys.modules["numpy"].random.set_state(states[2])


class _Run:
    """One run of a function on a twin: outputs, gradients under a fixed cotangent, and what it left behind."""

    def __init__(
        self,
        function: Callable[..., Any],
        twin: nn.Module,
        inputs: Sequence[Tensor],
        training: bool,
        backward: bool,
    ):
        for m in twin.modules():
            m.__dict__["training"] = training
        attributes, states = _attributes(twin), _random_states()
        torch.default_generator.manual_seed(2)  # the CPU's; `torch.manual_seed` is every device's
        try:
            self.values = _run(function, twin, inputs, backward)
            self.random = _random_states()[:2]
        finally:
            _restore(states)
        self.changed = not is_equal(_attributes(twin), attributes)

    def leaves_alike(self, other: _Run) -> bool:
        """Whether both drew as many random numbers; a module that changes itself is like no other."""
        alike = torch.equal(self.random[0], other.random[0]) and self.random[1] == other.random[1]
        return alike and not self.changed and not other.changed


def _attributes(twin: nn.Module) -> list[dict[str, Any]]:
    return [{name: _copied(value) for name, value in vars(m).items()} for m in twin.modules()]


def _run(
    function: Callable[..., Any], twin: nn.Module, inputs: Sequence[Tensor], backward: bool
) -> list[Tensor]:
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


@contextlib.contextmanager
def of_ours() -> Iterator[None]:
    """An error in here is a fault of ours, whatever code it passes on its way out."""
    try:
        yield
    except Exception as error:
        error.is_of_ours = True  # type: ignore[attr-defined]
        raise


def ends(function: Callable[..., Any], *args: Any, **kwargs: Any) -> bool:
    """Whether foreign code ran to its end, on a clone that is not whole.

    Raises: what `of_ours` has seen.
    """
    try:
        function(*args, **kwargs)
    except Exception as error:  # foreign code may raise anything
        if hasattr(error, "is_of_ours"):
            raise
        return False
    return True


class Theirs:
    """What `function(twin, *inputs)`, a module's own code, gives: as it is (`low`), and in float64 (`high`).

    In every mode that is asked for: in training, where it may drop, and in evaluation.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        twin: nn.Module,
        inputs: Sequence[Tensor],
        backward: bool = True,
        modes: Sequence[bool] = (True, False),
    ):
        """Raises: CannotRunAlone."""
        self._function, self._twin, self._inputs = function, twin, inputs
        self._in_float64 = (_widened(twin), [t.double() for t in inputs])
        self._backward = backward
        self._runs = {training: self._low_and_high(training, inputs) for training in modes}

    def _low_and_high(self, training: bool, inputs: Sequence[Tensor]) -> tuple[_Run, _Run]:
        try:
            low = _Run(self._function, self._twin, inputs, training, self._backward)
            wide = self._in_float64[0], [t.double() for t in inputs]
            with InFloat64():
                return low, _Run(self._function, *wide, training, self._backward)
        except Exception as error:  # foreign code may raise anything
            first, *_ = str(error).splitlines() or [""]
            raise CannotRunAlone(f"{type(error).__name__}: {first[:120]}") from error

    def agrees(self, ours: Callable[..., Any]) -> bool:
        """Whether `ours` is the same function, and the project's rule for numbers holds: for outputs and gradients.

        The rule measures ours by the error of theirs, and would allow all where theirs is random, or differs from its
        own truth in another way. So in float64, where neither has an error, ours has to be that truth. Where theirs
        draws random numbers, ours has to draw the same.
        """
        return self.is_computed_by(ours) and self._rounds(ours)

    def is_computed_by(self, ours: Callable[..., Any]) -> bool:
        """Whether `ours` is the same function, by outputs and gradients in float64, whatever it rounds otherwise."""
        for training, (_, high) in self._runs.items():
            true = _Run(ours, *self._in_float64, training, self._backward)
            if not true.leaves_alike(high) or not _within(
                true.values, high.values, high.values, 2.0
            ):
                return False
        return True

    def might_agree(self, ours: Callable[..., Any]) -> bool:
        """Whether its outputs are the truth: a cheap look at one of many candidates, before `agrees`."""
        for training, (_, high) in self._runs.items():
            true = _Run(ours, *self._in_float64, training, backward=False).values
            wanted = high.values[: len(true)]
            if not _within(true, wanted, wanted, 2.0):
                return False
        return True

    def rounds_like(self, ours: Callable[..., Any]) -> bool:
        """Whether `ours`, which `agrees`, rounds to 16 bits where theirs does, or at fewer places.

        Stricter than the rule, which leaves room for one rounding more, so that Llama's norm would pass for Gemma's:
        no error is added to theirs but that of fp32 arithmetic.
        """
        return all(
            _within(
                _Run(ours, self._twin, self._inputs, training, self._backward).values,
                high.values,
                low.values,
                1.0,
            )
            for training, (low, high) in self._runs.items()
        )

    def _rounds(self, ours: Callable[..., Any]) -> bool:
        """Whether the rule holds: by more draws where it is close, as `testing.assert_draws_no_worse` does.

        The errors of a few numbers are luck, which differs between processors, and a verdict must not.
        """
        for training, (low, high) in self._runs.items():
            inputs, draws = self._inputs, []
            for seed in range(_DRAWS):
                if seed:
                    inputs = _shaken(self._inputs, seed)
                    low, high = self._low_and_high(training, inputs)
                found = _Run(ours, self._twin, inputs, training, self._backward)
                draws.append([found.values, high.values, low.values])
                if seed + 1 in (1, _DRAWS):
                    a, b, c = map(_pooled, zip(*draws, strict=True))
                    ratio = _excess(a, b, c, 2.0)
                    if not _CLOSE[0] < ratio < _CLOSE[1]:
                        break
            if ratio > 1:
                return False
        return True


#: ratios of error to allowed error between which so many draws are taken; one more rounding to 16 bits gives thousands
_CLOSE, _DRAWS = (0.7, 100.0), 16


def _shaken(inputs: Sequence[Tensor], seed: int) -> list[Tensor]:
    """The same inputs but for their last digits, so that all roundings are others."""
    generator = torch.Generator().manual_seed(seed)
    noise = (torch.randn(t.shape, generator=generator) for t in inputs)
    return [(t * (1 + 0.01 * n)).to(t.dtype) for t, n in zip(inputs, noise, strict=True)]


def _pooled(runs: Sequence[Sequence[Tensor]]) -> list[Tensor]:
    return [torch.stack(values) for values in zip(*runs, strict=True)]


def _excess(
    ours: Sequence[Tensor], high: Sequence[Tensor], low: Sequence[Tensor], factor: float
) -> float:
    if len(ours) != len(low):
        return math.inf
    eps = torch.finfo(torch.float32).eps
    triples = zip(ours, high, low, strict=True)
    return max((excess(*tensors, eps=eps, factor=factor) for tensors in triples), default=0.0)


def _within(
    ours: Sequence[Tensor], high: Sequence[Tensor], low: Sequence[Tensor], factor: float
) -> bool:
    return _excess(ours, high, low, factor) <= 1


def within(ours: Sequence[Tensor], high: Sequence[Tensor]) -> bool:
    """Whether both, in float64, are the same but for rounding."""
    return _within(ours, high, high, 2.0)


class InFloat64(TorchDispatchMode):
    """What a module converts to float32, whatever it is given, becomes float64: the truth needs no other code."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        named = (kwargs or {}).items()
        return func(*args, **{n: torch.float64 if v is torch.float32 else v for n, v in named})


def _widened(module: nn.Module) -> nn.Module:
    """A copy with its parameters in float64."""
    twin = object.__new__(type(module))
    twin.__dict__.update({name: _copied(value) for name, value in module.__dict__.items()})
    wide = twin.__dict__["_parameters"]
    for name, p in module._parameters.items():
        if p is not None and p.is_floating_point():
            wide[name] = nn.Parameter(p.detach().double(), p.requires_grad)
    twin.__dict__["_modules"] = {n: c and _widened(c) for n, c in module._modules.items()}
    return twin


@contextlib.contextmanager
def sandbox() -> Iterator[None]:
    """On the CPU in fp32, by the reference; whatever the caller made the default while the model is being built.

    No random state is different afterwards.
    """
    dtype, states = torch.get_default_dtype(), _random_states()
    torch.set_default_dtype(torch.float32)
    torch.default_generator.manual_seed(0)
    try:
        with (
            _disable_current_modes(),  # fake tensors, say
            use_implementation("reference"),
            torch.inference_mode(False),
            torch.enable_grad(),
            torch.device("cpu"),
            torch.autocast("cpu", enabled=False),
        ):
            yield
    finally:
        torch.set_default_dtype(dtype)
        _restore(states)


_P = TypeVar("_P", bound=MethodPlan)


def verdict(
    find: Callable[[nn.Module], _P | None],
) -> Callable[[nn.Module], _P | str]:
    """Makes `find(module)`, run in the sandbox, say why there is no plan.

    What it says is kept for modules of the same shapes and facts, which go with the plan.
    """
    kept: dict[type, Any] = collections.defaultdict(lambda: collections.deque(maxlen=64))

    @functools.wraps(find)
    def found(module: nn.Module) -> _P | str:
        key = _shapes(module), tuple(parts_of(module))
        of_class = kept[type(module)]
        known = next((known for other, known in list(of_class) if is_equal(other, key)), None)
        if known is None:
            known = proven(find, module, key[1])
            of_class.append((key, known))
        return known if isinstance(known, str) else replace(known, facts=Facts(found, key[1]))

    found.cache_clear = kept.clear  # type: ignore[attr-defined]
    return found


def proven(
    find: Callable[[nn.Module], _P | None], module: nn.Module, parts: Sequence[Part] = ()
) -> _P | str:
    """The plan for a module of these facts, or why there is none; `find` runs in the sandbox."""
    name = without(type(module)).__name__
    tensors = sorted(name for part in parts for name in part.tensors)
    if tensors:
        return f"{name} computes with {', '.join(tensors)}, which may change"
    try:
        with sandbox():
            return find(module) or f"{name} computes something else"
    except CannotRunAlone as error:
        return f"{name} cannot be run alone: {error}"
