"""`liger_kernel bench`: an op beside PyTorch on this machine, forward and backward, on the op's own cases."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from liger_kernel import backends, utils
from liger_kernel.cli.answer import Answer, Table, UserError, size
from liger_kernel.cli.models import DTYPES
from liger_kernel.cli.present import track
from liger_kernel.ops import COMPUTED_BY
from liger_kernel.testing import OpCase, OpSpec, specs
from liger_kernel.testing.calls import call, drawing_on, drawn, leaves, wanted_inputs
from liger_kernel.testing.cases import elements

#: seconds of rounds for a case, and their number
BUDGET, FEWEST, MOST = 2.0, 5, 100
Calls = dict[str, Callable[[], Any]]


def cases_of(spec: OpSpec, device_type: str, named: Sequence[str] | None) -> list[OpCase]:
    """Those named; else the large ones on a GPU, and the two largest of the others on a CPU."""
    known = {case.id: case for case in spec.cases}
    if named:
        for name in named:
            if name not in known:
                raise UserError(f"unknown case {name!r} of {spec.name}; known: {', '.join(known)}")
        return [known[name] for name in named]
    if device_type != "cpu":
        return [case for case in spec.cases if case.large and not case.sweep]
    small = [case for case in spec.cases if not case.large]
    return sorted(small, key=elements)[-2:]


def rounds(calls: Calls, device_type: str) -> dict[str, list[float]]:
    """Milliseconds of each call, which take turns, so that whatever slows the machine slows them all."""
    clock = _host_clock if device_type == "cpu" else _device_clock(device_type)
    times: dict[str, list[float]] = {name: [] for name in calls}
    began = time.perf_counter()
    for i in range(MOST):
        for name, one in calls.items():
            times[name].append(clock(one))
        if i + 1 >= FEWEST and time.perf_counter() - began > BUDGET:
            break
    return times


def _host_clock(one: Callable[[], Any]) -> float:
    start = time.perf_counter()
    one()
    return (time.perf_counter() - start) * 1e3


def _device_clock(device_type: str) -> Callable[[Callable[[], Any]], float]:
    device = torch.get_device_module(device_type)

    def clock(one: Callable[[], Any]) -> float:
        start, end = (device.Event(enable_timing=True) for _ in range(2))
        start.record()
        one()
        end.record()
        device.synchronize()
        return float(start.elapsed_time(end))

    return clock


def peak(one: Callable[[], Any], device_type: str) -> int | None:
    """Bytes beyond what is in use now; None where nobody counts them."""
    if device_type == "cpu":
        return None
    device = torch.get_device_module(device_type)
    before = device.memory_allocated()
    device.reset_peak_memory_stats()
    one()
    device.synchronize()
    return int(device.max_memory_allocated() - before)


def measure(
    spec: OpSpec, case: OpCase, dtype: torch.dtype, device_type: str, compiled: bool
) -> dict[str, Any]:
    providers = {"ours": spec.function, "eager": spec.reference}
    if compiled:
        torch.compiler.reset()
        providers["compile"] = torch.compile(spec.reference, dynamic=False)
    calls: Calls = {}
    found: dict[str, Any] = {"case": case.id, "results": {}}
    results = found["results"]
    with drawing_on(device_type, dtype) as make:
        inputs, grads = drawn(spec, case, make)
        wanted = wanted_inputs(spec, case, inputs)
        for name, function in providers.items():

            def one(function: Any = function) -> Any:
                return call(function, case.options, leaves(inputs, wanted), grads)

            try:
                one()  # compiles
                results[name] = {"peak": peak(one, device_type)}
                calls[name] = one
            except Exception as error:  # out of memory, or whatever a compiler raises
                results[name] = {
                    "failed": f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
                }
        times = rounds(calls, device_type)
        n_bytes = spec.bytes_moved(inputs)
    for name, taken in times.items():
        ms = statistics.median(taken)
        results[name] |= {"ms": ms, "rounds": len(taken)}
        if n_bytes:
            results[name]["gb_s"] = n_bytes / ms / 1e6
        if case.flops:
            results[name]["tflop_s"] = case.flops / ms / 1e9
    return found


def answer(op: str, case: Sequence[str] | None, dtype: str, no_compile: bool) -> Answer:
    known = specs()
    if op not in known:
        raise UserError(f"unknown op {op!r}; known: {', '.join(sorted(known))}")
    if dtype not in DTYPES:
        raise UserError(f"--dtype {dtype} is unknown; known: {', '.join(DTYPES)}")
    spec, device_type = known[op], utils.infer_device()
    try:
        by, why = backends.serving(COMPUTED_BY.get(op, op), device_type, backends.requested())
    except RuntimeError as error:  # LIGER_KERNEL_IMPL asks for what is not here
        raise UserError(str(error)) from error
    chosen = cases_of(spec, device_type, case)
    found = [
        measure(spec, one, DTYPES[dtype], device_type, not no_compile)
        for one in track(chosen, f"bench {op}", len(chosen))
    ]
    device = backends.facts_of(backends.devices_of(device_type)[0]).name
    title = f"{op}, forward and backward, {dtype}, on {device}"
    rows = [row for one in found for row in _rows(one)]
    columns = ["case", "by", "ms", "ours is", "rate", "peak memory"]
    how = f"Medians of rounds in which they take turns, launches and warm caches included. Ours is computed by: {by}"
    how += f", since the kernels are disabled ({why})." if why else "."
    return Answer(
        {"op": op, "dtype": dtype, "device": device, "by": by, "cases": found},
        [Table(title, columns, rows), how],
    )


def _rows(found: dict[str, Any]) -> list[list[str]]:
    ours = found["results"]["ours"].get("ms")
    rows = []
    for name, result in found["results"].items():
        if "failed" in result:
            rows.append([found["case"], name, "failed", "", result["failed"], ""])
            continue
        ratio = f"{result['ms'] / ours:.2f}x as fast" if ours and name != "ours" else ""
        rate = f"{result['gb_s']:,.3g} GB/s" if "gb_s" in result else ""
        rate = f"{result['tflop_s']:,.3g} TFLOP/s" if "tflop_s" in result else rate
        memory = "" if result["peak"] is None else size(result["peak"])
        rows.append([found["case"], name, f"{result['ms']:.3f}", ratio, rate, memory])
    return rows
