"""Host time per call: how long Python is busy with one forward and one backward of each op, GPU time left out.

    python benchmark/host.py [OP ...]
    TRITON_INTERPRET=1 python benchmark/host.py rms_norm --device cpu  # does it run at all?

Small inputs, many calls queued, the clock read before the device has finished: what bounds small models. `ours` is the
op as users call it, which leaves the smallest inputs to PyTorch's own C++ ops; `kernels` always launches Triton; `one
thread` is that without the thread on which autograd runs a backward. The op "-" is an `autograd.Function` that
allocates its results and computes nothing, which no op written in Python can beat.
The rows are merged into benchmark/results/<gpu>.json.
"""

from __future__ import annotations

import argparse
import importlib
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import sources  # noqa: F401  first of ours: decides which liger_kernel is imported
import torch
from results import Row, default_path, describe_run, load, merge, save

from liger_kernel.backends import use_implementation
from liger_kernel.ops import OPS
from liger_kernel.testing import OpCase, OpSpec
from liger_kernel.testing.calls import as_tuple, drawing_on, drawn, leaves, wanted_inputs

CALLS = 100


@contextmanager
def one_thread() -> Iterator[None]:
    with use_implementation("triton"), torch.autograd.set_multithreading_enabled(False):
        yield


#: column -> in what the calls run
WAYS: dict[str, Callable[[], AbstractContextManager[Any]]] = {
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
    synchronize = torch.cuda.synchronize if device == "cuda" else lambda: None
    found = []
    for _ in range(5):
        synchronize()
        start = time.perf_counter()
        for _ in range(CALLS):
            function()
        found.append((time.perf_counter() - start) / CALLS * 1e6)
        synchronize()
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
    device = next(iter(grads.values())).device.type
    one = microseconds(forward, device)
    return {"fwd_us": one, "bwd_us": microseconds(both, device) - one}


def rows_of(spec: OpSpec, case: OpCase, device: str) -> Iterator[Row]:
    with drawing_on(device, torch.bfloat16) as make:
        inputs, grads = drawn(spec, case, make)
    args = leaves(inputs, wanted_inputs(spec, case, inputs))
    for way, context in WAYS.items():
        function = spec.reference if way == "eager" else spec.function
        with context():
            found = measured(function, case.options, args, grads)
        yield {"op": spec.name, "case": case.id, "provider": way, **found}


def floor(device: str) -> Iterator[Row]:
    x, weight = (torch.ones(1024, device=device, requires_grad=True) for _ in range(2))
    for way in ("kernels", "one thread"):
        with WAYS[way]():
            found = measured(_Noop.apply, {}, [x, weight], {0: torch.ones_like(x)})
        yield {"op": "-", "case": "2 inputs, 1 output", "provider": way, **found}


def all_rows(ops: list[str], device: str) -> Iterator[Row]:
    yield from floor(device)
    for op in ops or OPS:
        spec = importlib.import_module(f"liger_kernel.ops.{op}.cases").SPEC
        yield from rows_of(spec, next(case for case in spec.cases if not case.large), device)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("ops", nargs="*", metavar="OP", help=f"default: all; of {', '.join(OPS)}")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--json", type=Path, help="default: benchmark/results/<gpu>.json")
    args = parser.parse_args(argv)
    if unknown := sorted(set(args.ops) - set(OPS)):
        parser.error(f"unknown op {', '.join(unknown)}; known: {', '.join(OPS)}")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("torch sees no GPU; with --device cpu the times are those of host and device")
    path, run = args.json or default_path(args.device), describe_run(args.device)
    for row in all_rows(args.ops, args.device):
        print(
            f"{row['op']:28} {row['case']:20} {row['provider']:11} "
            f"forward {row['fwd_us']:7.1f} us  backward {row['bwd_us']:7.1f} us",
            flush=True,
        )
        save(path, merge(load(path), "host", run, [row]))


if __name__ == "__main__":
    main()
