"""Every op x case x dtype x implementation: outputs and all gradients against float64, and the rules of the house."""

from __future__ import annotations

import functools
import itertools
import os
from typing import Any

import pytest
import torch
from torch import Tensor

from liger_kernel import backends
from liger_kernel.ops import COMPUTED_BY
from liger_kernel.testing import Make, OpCase, OpSpec, assert_draws_no_worse, specs
from liger_kernel.testing.calls import (
    as_tuple,
    assert_as_exact,
    call,
    drawn,
    leaves,
    wanted_inputs,
)
from liger_kernel.testing.cases import elements
from tests import dummy_backend as _registered  # noqa: F401

SPECS: list[OpSpec] = list(specs().values())
WITH_GRADIENTS = [spec for spec in SPECS if spec.differentiable]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
DEVICE = os.environ.get("TEST_DEVICE") or next(
    (name for name in ("cuda", "xpu") if getattr(torch, name).is_available()), "cpu"
)
PAIRS = [
    pytest.param(spec, case, id=f"{spec.name}-{case.id}")
    for spec in SPECS
    for case in spec.cases
    if not case.large  # those are checked where they are timed, by benchmark/run.py
]


#: every implementation that serves this machine; None: the choice by device, which leaves small inputs to PyTorch
IMPLEMENTATIONS = [
    "reference",
    *(
        name
        for name, found in backends.IMPLEMENTATIONS.items()
        if found.compiled is None and found.unavailable(DEVICE) is None
    ),
    *([None] if DEVICE != "cpu" else []),
]


@pytest.fixture(params=IMPLEMENTATIONS, autouse=True)
def implementation(request: pytest.FixtureRequest) -> Any:
    with backends.use_implementation(request.param):
        yield request.param


def is_emulated(implementation: str | None) -> bool:
    """Triton's interpreter, or the stand-in for an NPU."""
    return (implementation, DEVICE) in (("triton", "cpu"), ("npu", "npu"))


@functools.cache
def inputs_that_are_there(op: str) -> list[tuple[bool, ...]]:
    """For each of its cases; for large ones nothing."""
    spec, make = specs()[op], Make(torch.float32)
    given = [() if case.large else drawn(spec, case, make)[0] for case in spec.cases]
    return [tuple(t is not None for t in inputs) for inputs in given]


def falls_back(op: str, implementation: str | None) -> bool:
    """Whether an implementation that has a name has no file for `op`, which then runs its reference."""
    found = backends.IMPLEMENTATIONS.get(implementation or "")
    return found is not None and not backends.is_there(found.module(COMPUTED_BY.get(op, op)))


@pytest.fixture(autouse=True)
def falls_back_once(request: pytest.FixtureRequest, implementation: str | None) -> None:
    """An op without a file of this implementation is its reference, tested above: its first case will do."""
    given = request.node.callspec.params
    spec, case = given["spec"], given.get("case")
    if falls_back(spec.name, implementation) and case not in (None, spec.cases[0]):
        pytest.skip("the reference, as in the other tests")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("spec", "case"), PAIRS)
def test_as_exact_as_pytorch(
    spec: OpSpec, case: OpCase, dtype: torch.dtype, implementation: str | None
) -> None:
    number = spec.cases.index(case)
    left_out = (torch.float16, torch.bfloat16 if number % 3 else None)
    if is_emulated(implementation) and number > 1 and dtype in left_out:
        pytest.skip("emulated, 16 bits are float32 with casts, which all cases share")
    inputs, grads = drawn(spec, case, Make(dtype, DEVICE))
    before = [None if t is None else t.clone() for t in (*inputs, *grads.values())]
    assert_as_exact(
        spec, case, inputs, grads, lambda seed: drawn(spec, case, Make(dtype, DEVICE, seed))
    )
    for i, (t, was) in enumerate(zip((*inputs, *grads.values()), before, strict=True)):
        assert t is None or torch.equal(t.nan_to_num(), was.nan_to_num()), f"tensor {i} was changed"


@pytest.mark.parametrize(("spec", "case"), PAIRS)
def test_gradients_for_exactly_what_requires_them(
    spec: OpSpec, case: OpCase, implementation: str | None
) -> None:
    """Two runs are bit-equal, and any subset of inputs with `requires_grad=True` gets the gradients that all get.

    Emulated, a kernel takes seconds, and has one order: four cases of each op are run, and those with other optional
    inputs; two of them twice, and three without any gradient; and of many inputs it is asked for one alone and for the
    others, in each case another one.
    """
    number = spec.cases.index(case)
    emulated = is_emulated(implementation)
    there = inputs_that_are_there(spec.name)
    if emulated and number > 3 and there[number] in there[:number]:
        pytest.skip("emulated, which gradients are asked for matters to an op, not to each case")
    inputs, grads = drawn(spec, case, Make(torch.float32, DEVICE))
    wanted = [i for i in spec.differentiable if inputs[i] is not None]
    outputs, everything = call(spec.function, case.options, leaves(inputs, set(wanted)), grads)
    again, everything_again = outputs, everything
    if number < 2 or not emulated:
        again, everything_again = call(
            spec.function, case.options, leaves(inputs, set(wanted)), grads
        )
    for i, (a, b) in enumerate(zip(outputs, again, strict=True)):
        assert a is None or torch.equal(a.nan_to_num(), b.nan_to_num()), (
            f"output {i} is not deterministic"
        )
    for i in wanted:
        assert torch.equal(everything[i], everything_again[i]), f"gradient {i} is not deterministic"
    # of many inputs, one alone, and all but one
    sizes = range(len(wanted)) if len(wanted) < 4 else (0, 1, len(wanted) - 1)
    subsets = [s for size in sizes for s in itertools.combinations(wanted, size)]
    if len(subsets) > 3 and (emulated or (DEVICE == "cpu" and elements(case) > 2**12)):
        one = wanted[number % len(wanted)]
        subsets = [(), (one,), tuple(i for i in wanted if i != one)]
    if emulated and number > 2:
        subsets = [subset for subset in subsets if subset]

    def gradients(inputs: Any, grads: Any, subset: tuple[int, ...]) -> dict[int, Tensor]:
        outputs, some = call(spec.function, case.options, leaves(inputs, set(subset)), grads)
        assert some.keys() == set(subset)
        if not subset:
            assert not any(isinstance(o, Tensor) and o.requires_grad for o in outputs)
        return some

    # those that all get, to the bit, are judged by the test above
    others = {}
    for subset in subsets:
        some = gradients(inputs, grads, subset)
        if found := [i for i in subset if not torch.equal(some[i], everything[i])]:
            others[subset] = found

    def draw(seed: int) -> Any:
        inputs, grads = drawn(spec, case, Make(torch.float32, DEVICE, seed))
        _, high = call(
            spec.reference, case.options, leaves(inputs, set(wanted), torch.float64), grads
        )
        _, low = call(spec.reference, case.options, leaves(inputs, set(wanted)), grads)
        runs: tuple[dict[str, Tensor], ...] = ({}, {}, {})
        for subset, found in others.items():
            some = gradients(inputs, grads, subset)
            for i in found:
                for run, of_run in zip(runs, (some, high, low), strict=True):
                    run[f"gradient {i} with only {subset} required"] = of_run[i]
        return runs

    if others:
        assert_draws_no_worse(draw)


@pytest.mark.parametrize("spec", WITH_GRADIENTS, ids=lambda spec: spec.name)
def test_second_backward_is_the_first_again(spec: OpSpec) -> None:
    case = spec.cases[0]
    inputs, grads = drawn(spec, case, Make(torch.float32, DEVICE))
    args = leaves(inputs, {i for i in spec.differentiable if inputs[i] is not None})
    outputs = as_tuple(spec.function(*args, **case.options))
    wanted = [t for t in args if isinstance(t, Tensor) and t.requires_grad]
    roots = [(outputs[i], g) for i, g in grads.items() if outputs[i].requires_grad]

    def backward() -> list[Tensor]:
        return list(
            torch.autograd.grad(
                [r for r, _ in roots], wanted, [g for _, g in roots], retain_graph=True
            )
        )

    first = [g.clone() for g in backward()]
    second = backward()
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)


class Cut(torch.autograd.Function):
    """Sends no gradient back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> None:
        return None


@pytest.mark.parametrize("spec", WITH_GRADIENTS, ids=lambda spec: spec.name)
def test_no_gradient_arrives(spec: OpSpec) -> None:
    case = spec.cases[0]
    inputs, grads = drawn(spec, case, Make(torch.float32, DEVICE))
    args = leaves(inputs, wanted_inputs(spec, case, inputs))
    outputs = as_tuple(spec.function(*args, **case.options))
    total = sum(Cut.apply(outputs[i]).sum() for i in grads)
    wanted = [t for t in args if isinstance(t, Tensor) and t.requires_grad]
    for grad in torch.autograd.grad(total, wanted, allow_unused=True):
        assert grad is None or not grad.any()
