"""Gradients to scale, for tests and benchmarks."""

from __future__ import annotations

from typing import Any

from liger_kernel.ops.scale_gradients import reference, scale_gradients
from liger_kernel.testing import Inputs, OpSpec, case


def _scaled(*tensors: Any) -> tuple[Any, ...]:
    *buffers, factor = tensors
    copies = [None if t is None else t.clone() for t in buffers]
    scale_gradients(copies, factor)
    return tuple(copies)


def of(n: int, factor: float) -> Inputs:
    return lambda m: (m.randn(n), m.randn(3, 5), m.randn(7), m.randn(1)[0] * 0 + factor)


SPEC = OpSpec(
    name="scale_gradients",
    function=_scaled,
    reference=reference.scale_gradients,
    cases=(
        case("three", "several blocks, the last one short", of(9000, 0.37)),
        case("one", "a factor of 1 leaves everything as it is", of(5000, 1.0)),
        case("empty", "a buffer without elements is left out", of(0, 3.0)),
        case("alone", "one buffer of three", lambda m: (m.randn(33), None, None, m.randn(1)[0])),
    ),
    differentiable=(),
    traffic=(2, (0,)),
)
