"""Calling an op of an `OpSpec` the way every test and benchmark does: inputs, cotangents, outputs and gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from liger_kernel.backends import use_implementation
from liger_kernel.testing.cases import Make, OpCase, OpSpec
from liger_kernel.testing.compare import assert_draws_no_worse

Inputs = tuple[Tensor | None, ...]


def as_tuple(value: Any) -> tuple[Any, ...]:
    return value if isinstance(value, tuple) else (value,)


def wanted_inputs(spec: OpSpec, case: OpCase, inputs: Inputs) -> set[int]:
    """Positions of every input that is there and requires a gradient in `case`."""
    return {i for i in spec.differentiable if inputs[i] is not None and i not in case.frozen}


def leaves(inputs: Inputs, wanted: set[int], dtype: torch.dtype | None = None) -> list[Any]:
    """The inputs with their own strides (floats in `dtype`), those in `wanted` as leaves that require a gradient."""
    result: list[Any] = []
    for i, t in enumerate(inputs):
        if t is not None and t.is_floating_point():
            t = t.detach().to(dtype or t.dtype)
        result.append(t.requires_grad_() if i in wanted and t is not None else t)
    return result


def cotangents(
    spec: OpSpec, case: OpCase, outputs: tuple[Any, ...], make: Make
) -> dict[int, Tensor]:
    """A random gradient for every output that carries one."""
    without = (*spec.outputs_without_grad, *case.unused)
    return {
        i: make.randn(1, *out.shape)[0].to(out.dtype)
        for i, out in enumerate(outputs)
        if isinstance(out, Tensor) and out.is_floating_point() and i not in without
    }


def drawn(spec: OpSpec, case: OpCase, make: Make) -> tuple[Inputs, dict[int, Tensor]]:
    """Inputs of `case` and a cotangent for every output that carries a gradient."""
    inputs = case.inputs(make)
    return inputs, cotangents(spec, case, output_shapes(spec, case, inputs), make)


def output_shapes(spec: OpSpec, case: OpCase, inputs: Inputs) -> tuple[Any, ...]:
    """What the reference returns, on the meta device: a reference at full size may not fit the memory."""
    shadows = tuple(t if t is None else t.detach().to("meta") for t in inputs)
    with torch.device("meta"), use_implementation("reference"):
        return as_tuple(spec.reference(*shadows, **case.options))


def backward(
    outputs: tuple[Any, ...], inputs: list[Any], grads: dict[int, Tensor], **options: Any
) -> dict[int, Tensor]:
    """The gradient of every input that requires one."""
    wanted = {i: t for i, t in enumerate(inputs) if isinstance(t, Tensor) and t.requires_grad}
    roots = [
        (outputs[i], g.to(outputs[i].dtype)) for i, g in grads.items() if outputs[i].requires_grad
    ]
    if not wanted or not roots:
        return {i: torch.zeros_like(t) for i, t in wanted.items()}
    found = torch.autograd.grad(
        [out for out, _ in roots],
        list(wanted.values()),
        [g for _, g in roots],
        allow_unused=True,
        **options,
    )
    return {
        i: torch.zeros_like(t) if g is None else g
        for (i, t), g in zip(wanted.items(), found, strict=True)
    }


def call(
    function: Callable[..., Any],
    options: Mapping[str, Any],
    inputs: list[Any],
    grads: dict[int, Tensor],
) -> tuple[tuple[Any, ...], dict[int, Tensor]]:
    """Outputs, and the gradient of every input that requires one."""
    outputs = as_tuple(function(*inputs, **options))
    return outputs, backward(outputs, inputs, grads)


def assert_as_exact(
    spec: OpSpec,
    case: OpCase,
    inputs: Inputs,
    grads: dict[int, Tensor],
    redraw: Callable[[int], tuple[Inputs, dict[int, Tensor]]] | None = None,
) -> None:
    """AssertionError where outputs or gradients of the op are worse than those of the reference, against float64.

    `redraw(seed)` gives other inputs and cotangents, for an error that is close to what is allowed.
    """

    def draw(seed: int) -> Any:
        given, cotangent = redraw(seed) if seed and redraw else (inputs, grads)
        wanted = wanted_inputs(spec, case, given)
        runs = []
        for function, dtype in (
            (spec.function, None),
            (spec.reference, torch.float64),
            (spec.reference, None),
        ):
            found = call(function, case.options, leaves(given, wanted, dtype), cotangent)
            runs.append(named(*found))
        return runs

    elementwise = [f"output {i}" for i in spec.elementwise]
    assert_draws_no_worse(draw, last=64 if redraw else 1, elementwise=elementwise)


def named(outputs: tuple[Any, ...], grads: dict[int, Tensor]) -> dict[str, Tensor]:
    """What a call gives, by the names that `assert_draws_no_worse` prints."""
    found = {f"output {i}": out.detach() for i, out in enumerate(outputs) if out is not None}
    return found | {f"gradient of input {i}": grad for i, grad in grads.items()}


class DeviceMake(Make):
    """Draws on the device itself: other numbers than `Make`, but gigabytes of them in no time.

    Made by `drawing_on`, which also makes the device the default of torch's factories.
    """

    def __post_init__(self) -> None:
        self._generator = torch.Generator(self.device).manual_seed(self.seed)


@contextmanager
def drawing_on(
    device: torch.device | str, dtype: torch.dtype, seed: int = 0
) -> Iterator[DeviceMake]:
    with torch.device(device):
        yield DeviceMake(dtype, device, seed)
