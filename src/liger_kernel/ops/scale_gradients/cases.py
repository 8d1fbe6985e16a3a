"""Gradients to scale, for tests and benchmarks."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from liger_kernel.ops.scale_gradients import reference, scale_gradients
from liger_kernel.testing import OpCase, OpSpec


def _scaled(
    a: Tensor, b: Tensor | None, c: Tensor | None, factor: Tensor
) -> tuple[Tensor | None, ...]:
    copies = [None if t is None else t.clone() for t in (a, b, c)]
    scale_gradients(copies, factor)
    return tuple(copies)


def _case(id: str, why: str, n: int, value: float, large: bool = False) -> OpCase:
    def inputs(make: Any) -> tuple[Tensor | None, ...]:
        return make.randn(n), make.randn(3, 5), make.randn(7), make.randn(1)[0] * 0 + value

    return OpCase(id, why, inputs, bytes_moved=lambda size: 2 * n * size, large=large)


SPEC = OpSpec(
    name="scale_gradients",
    function=_scaled,
    reference=reference.scale_gradients,
    differentiable=(),
    cases=(
        _case("three", "several blocks, the last one short", 9000, 0.37),
        _case("one", "a factor of 1 leaves everything as it is", 5000, 1.0),
        _case("empty", "a buffer without elements is left out", 0, 3.0),
        OpCase("alone", "one buffer of three", lambda m: (m.randn(33), None, None, m.randn(1)[0])),
    ),
)
