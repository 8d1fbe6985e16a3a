"""Host time per call: how long Python is busy with one forward and one backward of each op, GPU time left out.

    python benchmark/host.py [OP ...] [--json FILE]

Small inputs, many calls queued, the clock read before the device has finished: what bounds small models. `ours` is the
op as users call it, which leaves the smallest inputs to PyTorch's own C++ ops; `kernels` always launches Triton; `noop`
is an `autograd.Function` that allocates its results and computes nothing, which no Python op can beat.
The rows are merged into benchmark/results/<gpu>.json.
"""

from __future__ import annotations

import argparse
import importlib
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import sources  # noqa: F401  first of ours: decides which liger_kernel is imported
import torch
from results import Row, default_path, describe_run, load, merge, save

from liger_kernel.backends import use_implementation
from liger_kernel.ops import OPS
from liger_kernel.testing import OpCase, OpSpec
from liger_kernel.testing.calls import as_tuple, drawing_on, drawn, leaves, wanted_inputs

CALLS = 300


class _Noop(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, ...]:
        x, weight = ctx.saved_tensors
        return torch.empty_like(x), torch.empty_like(weight)


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
) -> dict[str, float]:
    """Host time of the forward, and of the backward alone, with the accumulation of its gradients."""

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
    return {"fwd_us": one, "bwd_us": microseconds(both) - one}


def rows_of(spec: OpSpec, case: OpCase) -> Iterator[Row]:
    with drawing_on("cuda", torch.bfloat16) as make:
        inputs, grads = drawn(spec, case, make)
    args = leaves(inputs, wanted_inputs(spec, inputs))
    for provider, function in (
        ("ours", spec.function),
        ("kernels", spec.function),
        ("eager", spec.reference),
    ):
        with use_implementation("triton") if provider == "kernels" else nullcontext():
            found = measured(function, case.options, args, grads)
        yield {"op": spec.name, "case": case.id, "provider": provider, **found}


def floor() -> Row:
    x, weight = (torch.ones(n, device="cuda", requires_grad=True) for n in (1024, 1024))
    found = measured(_Noop.apply, {}, [x, weight], {0: torch.ones_like(x)})
    return {"op": "-", "case": "two inputs, one output", "provider": "noop", **found}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("ops", nargs="*", metavar="OP", help=f"default: all; of {', '.join(OPS)}")
    parser.add_argument("--json", type=Path, help="default: benchmark/results/<gpu>.json")
    args = parser.parse_args(argv)
    if unknown := sorted(set(args.ops) - set(OPS)):
        parser.error(f"unknown op {', '.join(unknown)}; known: {', '.join(OPS)}")
    if not torch.cuda.is_available():
        parser.error("torch sees no GPU: without one, host and device cannot be told apart")
    rows = [floor()]
    for op in args.ops or OPS:
        spec = importlib.import_module(f"liger_kernel.ops.{op}.cases").SPEC
        rows += rows_of(spec, next(case for case in spec.cases if not case.large))
    for row in rows:
        print(
            f"{row['op']:28} {row['case']:22} {row['provider']:8} "
            f"forward {row['fwd_us']:7.1f} us  backward {row['bwd_us']:7.1f} us"
        )
    path = args.json or default_path("cuda")
    save(path, merge(load(path), "host", describe_run("cuda"), rows))


if __name__ == "__main__":
    main()
