"""Host time per call: how long Python is busy with one forward and one backward of each op, GPU time left out.

    python -m benchmark host [OP ...]
    TRITON_INTERPRET=1 python -m benchmark host rms_norm --device cpu  # does it run at all?

Small inputs, many calls queued, the clock read before the device has finished: what bounds small models. `ours` is the
op as users call it, which leaves the smallest inputs to PyTorch's own C++ ops; `kernels` always launches Triton; `one
thread` is that without the thread on which autograd runs a backward. The op "-" is an `autograd.Function` that
allocates its results and computes nothing, which no op written in Python can beat.
The rows are merged into benchmark/results/<gpu>.json.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch

from benchmark import children, sources
from benchmark.measure import synchronize
from benchmark.options import MeasuringParser
from benchmark.providers import PROVIDERS
from benchmark.results import Row, default_path, describe_run, keep
from liger_kernel.backends import use_implementation
from liger_kernel.testing import OpCase, OpSpec, specs
from liger_kernel.testing.calls import as_tuple, drawing_on, drawn, leaves, wanted_inputs

CALLS = 100


@contextmanager
def one_thread() -> Iterator[None]:
    with use_implementation("triton"), torch.autograd.set_multithreading_enabled(False):
        yield


Ways = dict[str, Callable[[], AbstractContextManager[Any]]]
#: column -> in what the calls run
WAYS: Ways = {
    "ours": nullcontext,
    "kernels": partial(use_implementation, "triton"),
    "one thread": one_thread,
    "eager": nullcontext,
}


class _Noop(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, ...]:
        x, weight = ctx.saved_tensors
        return torch.empty_like(x), torch.empty_like(weight)


def microseconds(function: Callable[[], Any], device: str) -> float:
    """Median over 5 rounds of CALLS calls each."""
    found = []
    for _ in range(5):
        synchronize(device)
        start = time.perf_counter()
        for _ in range(CALLS):
            function()
        found.append((time.perf_counter() - start) / CALLS * 1e6)
        synchronize(device)
    return sorted(found)[2]


def measured(
    function: Callable[..., Any], args: list[Any], grads: dict[int, torch.Tensor]
) -> dict[str, float]:
    """Host time of the forward, and of the backward alone, with the accumulation of its gradients."""

    def forward() -> tuple[Any, ...]:
        return as_tuple(function(*args))

    def both() -> None:
        outputs = forward()
        torch.autograd.backward(
            [outputs[i] for i in grads], [g.to(outputs[i].dtype) for i, g in grads.items()]
        )

    for _ in range(3):
        both()
    device = next(iter(grads.values())).device.type
    one = microseconds(forward, device)
    return {"fwd_us": one, "bwd_us": microseconds(both, device) - one}


def rows_of(spec: OpSpec, case: OpCase, device: str, ways: Ways) -> Iterator[Row]:
    with drawing_on(device, torch.bfloat16) as make:
        inputs, grads = drawn(spec, case, make)
    args = leaves(inputs, wanted_inputs(spec, case, inputs))
    for way, context in ways.items():
        function = PROVIDERS[way if way in PROVIDERS else "ours"].bind(spec, case)
        if function is not None:
            with context():
                found = measured(function, args, grads)
            yield {"op": spec.name, "case": case.id, "provider": way, **found}


def floor(device: str) -> Iterator[Row]:
    x, weight = (torch.ones(1024, device=device, requires_grad=True) for _ in range(2))
    for way in ("kernels", "one thread"):
        with WAYS[way]():
            found = measured(_Noop.apply, [x, weight], {0: torch.ones_like(x)})
        yield {"op": "-", "case": "2 inputs, 1 output", "provider": way, **found}


def smallest(ops: list[str]) -> list[tuple[OpSpec, OpCase]]:
    return [
        (spec, next(case for case in spec.cases if not case.large))
        for spec in specs().values()
        if spec.name in ops or not ops
    ]


def at_base(report: children.Report, ops: list[str], device: str, site: str) -> None:
    pairs = smallest(ops)  # ours, for the inputs
    sources.become(site)
    for spec, case in pairs:
        for row in rows_of(spec, case, device, {"base": nullcontext}):
            report(row)


def main(argv: list[str] | None = None) -> int:
    parser = MeasuringParser("host", __doc__, "json", "base")
    parser.add_argument(
        "ops", nargs="*", metavar="OP", help=f"default: all; of {', '.join(specs())}"
    )
    args = parser.read(argv)
    parser.only("op", args.ops, specs())
    path, run = args.json or default_path(args.device), describe_run(args.device)

    def take(rows: Iterable[Row]) -> None:
        for row in rows:
            print(
                f"{row['op']:28} {row['case']:20} {row['provider']:11} "
                f"forward {row['fwd_us']:7.1f} us  backward {row['bwd_us']:7.1f} us",
                flush=True,
            )
            keep(path, "host", run, [row])

    take(floor(args.device))
    for spec, case in smallest(args.ops):
        take(rows_of(spec, case, args.device, WAYS))
    if args.base:
        with sources.folder_of("base", None, args.base) as site:
            take(children.rows(at_base, args.ops, args.device, site))
    return 0
