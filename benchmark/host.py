"""Host time per call: how long Python is busy with one forward and one backward of each op, GPU time left out.

    python benchmark/host.py [OP ...]

Small inputs, many calls queued, the clock read before the device has finished: what bounds small models.
"""

from __future__ import annotations

import importlib
import sys
import time
from collections.abc import Callable
from typing import Any

import torch

from liger_kernel.ops import OPS
from liger_kernel.testing.calls import as_tuple, drawing_on, drawn, leaves, wanted_inputs

CALLS = 300


def microseconds(function: Callable[[], Any]) -> float:
    """Median over 5 rounds of CALLS calls each."""
    found = []
    for _ in range(5):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(CALLS):
            function()
        found.append((time.perf_counter() - start) / CALLS * 1e6)
        torch.cuda.synchronize()
    return sorted(found)[2]


def measured(
    function: Callable[..., Any], options: Any, args: list[Any], grads: dict[int, torch.Tensor]
) -> tuple[float, float]:
    """Host time of the forward, and of the backward alone."""

    def forward() -> tuple[Any, ...]:
        return as_tuple(function(*args, **options))

    def both() -> None:
        outputs = forward()
        torch.autograd.backward(
            [outputs[i] for i in grads], [g.to(outputs[i].dtype) for i, g in grads.items()]
        )

    for _ in range(3):
        both()
    one = microseconds(forward)
    return one, microseconds(both) - one


def main() -> None:
    print(
        f"{'op':28} {'case':16} {'ours fwd':>9} {'bwd':>7} {'eager fwd':>9} {'bwd':>7}   microseconds of host time"
    )
    for op in sys.argv[1:] or OPS:
        spec = importlib.import_module(f"liger_kernel.ops.{op}.cases").SPEC
        case = next(c for c in spec.cases if not c.large)
        with drawing_on("cuda", torch.bfloat16) as make:
            inputs, grads = drawn(spec, case, make)
        args = leaves(inputs, wanted_inputs(spec, inputs))
        ours = measured(spec.function, case.options, args, grads)
        eager = measured(spec.reference, case.options, args, grads)
        print(f"{op:28} {case.id:16} {ours[0]:9.1f} {ours[1]:7.1f} {eager[0]:9.1f} {eager[1]:7.1f}")


if __name__ == "__main__":
    main()
