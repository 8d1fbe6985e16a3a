"""The ops on a processor, beside eager PyTorch: forward and backward, sizes of `shapes.ON_CPU`.

    python -m benchmark cpu                       # every op, float32 and bfloat16, on one thread
    python -m benchmark cpu glu --threads 4

`ours` is the op as users call it, `inductor` the same where they ask for LIGER_KERNEL_IMPL=inductor; `eager` is its
reference as PyTorch runs it; `torch` PyTorch's own fused form, where it has one. All of them take turns, so that
whatever else the machine does slows all of them; the fastest turn counts. Of one thread the processor's time is read,
which other programs disturb little.
The rows are merged into benchmark/results/<processor>.json.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch

from benchmark.measure import release
from benchmark.options import MeasuringParser
from benchmark.providers import PROVIDERS
from benchmark.results import Row, describe_run, keep, path_of, processor
from benchmark.shapes import ON_CPU
from benchmark.workload import Workload
from liger_kernel.backends import serving, use_implementation
from liger_kernel.backends.inductor import INDUCTOR
from liger_kernel.ops import COMPUTED_BY, OPS
from liger_kernel.testing import OpCase, OpSpec, specs

COLUMNS = ("ours", "inductor", "eager", "torch")


def _inductor(spec: OpSpec, case: OpCase) -> Callable[..., Any] | None:
    """The op as it is computed on request; None where that is as it is computed anyway."""
    if spec.name not in OPS:  # losses over hidden states and shards, which nobody compiles
        return None
    if serving(COMPUTED_BY.get(spec.name, spec.name), "cpu", INDUCTOR.name)[0] != INDUCTOR.name:
        return None

    def requested(*tensors: Any) -> Any:
        with use_implementation(INDUCTOR.name):
            return spec.function(*tensors, **case.options)

    return requested


def rows_of(op: str, dtype: torch.dtype, turns: int) -> Iterator[Row]:
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    spec, (size, inputs) = specs()[op], ON_CPU[op]
    large = [case for case in spec.cases if case.large]
    usual = next((case for case in large if case.id == size), (large or spec.cases)[0])
    work = Workload(spec, replace(usual, id=size, inputs=inputs), dtype, "cpu")
    calls: dict[str, Any] = {}
    for name in COLUMNS:
        function = (
            _inductor(spec, work.case)
            if name == "inductor"
            else PROVIDERS[name].bind(spec, work.case)
        )
        if function is not None:
            (calls[name],) = work.calls(function, "full")
    taken: dict[str, list[float]] = {name: [] for name in calls}
    order = list(calls)
    for turn in range(turns + 1):  # the first warms up
        order = order[1:] + order[:1]  # who comes after whom decides what lies in the cache
        for name in order:
            start = clock()
            calls[name]()
            if turn:
                taken[name].append((clock() - start) * 1e3)
    for name, times in taken.items():
        yield {
            "op": op,
            "case": size,
            "dtype": str(dtype).removeprefix("torch."),
            "provider": name,
            "mode": "full",
            "ms": min(times),
        }


def main(argv: list[str] | None = None) -> int:
    parser = MeasuringParser("cpu", __doc__, "json")
    parser.set_defaults(device="cpu")
    parser.add_argument(
        "ops", nargs="*", metavar="OP", help=f"default: all; of {', '.join(ON_CPU)}"
    )
    parser.add_argument("--threads", type=int, default=1, help="of PyTorch; default: %(default)s")
    parser.add_argument("--turns", type=int, default=9, help="default: %(default)s")
    args = parser.read(argv)
    parser.only("op", args.ops, ON_CPU)
    if args.device != "cpu" or args.threads < 1 or args.turns < 1:
        parser.error("this is for --device cpu, with at least one thread and one turn")
    torch.set_num_threads(args.threads)
    path = args.json or path_of(processor())
    run = describe_run("cpu", processor=processor(), threads=args.threads)
    for op in args.ops or ON_CPU:
        for dtype in (torch.float32, torch.bfloat16):
            rows = list(rows_of(op, dtype, args.turns))
            keep(path, "ops", run, rows)
            ms = {row["provider"]: row["ms"] for row in rows}
            print(
                f"{op:28} {rows[0]['case']:18} {rows[0]['dtype']:9}",
                *(f"{name} {value:8.2f} ms" for name, value in ms.items()),
                *(f"{value / ms['ours']:5.2f}x of {name}" for name, value in list(ms.items())[1:]),
                flush=True,
            )
            release()
    return 0
