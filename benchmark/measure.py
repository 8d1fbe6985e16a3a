"""Clocks, counters and ceilings. Knows torch and nothing of this library."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

Call = Callable[[], Any]


class NotCapturable(Exception):
    """The call cannot be captured in a CUDA graph; the message says why."""


@dataclass(frozen=True)
class Timing:
    """Median, 20th and 80th percentile in milliseconds."""

    ms: float
    p20: float
    p80: float

    @staticmethod
    def of(times: Sequence[float]) -> Timing:
        fifths = (
            statistics.quantiles(times, n=5, method="inclusive")
            if len(times) > 1
            else [times[0]] * 4
        )
        return Timing(statistics.median(times), fifths[0], fifths[3])


@dataclass(frozen=True)
class Ceilings:
    """What this device reaches at best: device copy (bytes read plus written) and bf16 matrix product."""

    copy_gb_s: float
    gemm_tflop_s: float


def host_inclusive(call: Call, device: str, budget_ms: float) -> Timing:
    """One call from the host at a time, caches cold: what an eager training step pays."""
    if device == "cpu":
        return _on_cpu(call, budget_ms)
    from triton.testing import do_bench

    call()  # compiles
    estimate = _event_times(call, 1)[0]
    repeat = min(max(budget_ms, 8 * estimate), 20 * budget_ms)
    median, p20, p80 = do_bench(call, warmup=budget_ms / 4, rep=repeat, quantiles=[0.5, 0.2, 0.8])
    return Timing(median, p20, p80)


def _on_cpu(call: Call, budget_ms: float) -> Timing:
    call()
    times: list[float] = []
    while len(times) < 3 or (sum(times) < budget_ms and len(times) < 100):
        start = time.perf_counter()
        call()
        times.append((time.perf_counter() - start) * 1e3)
    return Timing.of(times)


def _event_times(call: Call, repeats: int) -> list[float]:
    times = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end))
    return times


def gpu_only(
    prepare: Callable[[], Sequence[Call]], estimate_ms: float, call_peak_mb: float
) -> Timing:
    """Time of the kernels alone: the calls, many times in turn, in one replayed CUDA graph.

    `prepare` runs on the stream that captures, because a backward runs on the stream of its forward. It returns one
    call per copy of the inputs: so many copies that together they exceed the L2 cache. `call_peak_mb`: see `peak_mb`.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        calls = prepare()
        for call in calls:
            call()
        torch.cuda.synchronize()
        _check_no_sync(calls[0])
    rounds = max(1, min(256, int(20 / estimate_ms)) // len(calls))
    release()
    _check_room(call_peak_mb)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph, stream=stream):
            for _ in range(rounds):
                for call in calls:
                    call()
    except RuntimeError as error:
        raise NotCapturable(str(error).splitlines()[0]) from error
    times = _event_times(graph.replay, 12)[2:]
    graph.reset()
    return Timing.of([t / (rounds * len(calls)) for t in times])


def _check_room(call_peak_mb: float) -> None:
    """A graph takes memory of its own, in pieces that it cannot merge; if it runs out, all is lost to the process."""
    free_mb = torch.cuda.mem_get_info()[0] / 1e6
    if 2 * call_peak_mb > free_mb:
        raise NotCapturable(
            f"a graph may take {2 * call_peak_mb:.0f} MB, and {free_mb:.0f} MB are free"
        )


def _check_no_sync(call: Call) -> None:
    """A failed capture can leave the process unusable, so what must make it fail is looked for first."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        call()
    except RuntimeError as error:
        raise NotCapturable(str(error).splitlines()[0]) from error
    finally:
        torch.cuda.set_sync_debug_mode("default")


def copies_beyond_cache(bytes_per_call: int) -> int:
    """How many copies of the inputs exceed twice the L2 cache, at most 16."""
    cache = torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size
    return max(1, min(16, -(-2 * cache // max(1, bytes_per_call))))


def release() -> None:
    """Hand back the memory that nobody uses. One cuBLAS workspace left in a cached segment would keep all of it."""
    gc.collect()
    if torch.cuda.is_available():
        torch._C._cuda_clearCublasWorkspaces()
        torch.cuda.empty_cache()


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def peak_mb(call: Call) -> float:
    """Most memory in use during the call beyond what is in use now, its results included."""
    gc.collect()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    kept = call()
    torch.cuda.synchronize()
    del kept
    return (torch.cuda.max_memory_allocated() - before) / 1e6


def allocations(call: Call) -> int:
    key = "allocation.all.allocated"
    before = torch.cuda.memory_stats()[key]
    call()
    return int(torch.cuda.memory_stats()[key] - before)


def launches(call: Call) -> int | None:
    """Kernels, memsets and copies that the call puts on the device; None where the profiler does not work."""
    torch.cuda.synchronize()
    try:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            call()
            torch.cuda.synchronize()
    except RuntimeError:
        return None
    return sum(event.device_type == torch.autograd.DeviceType.CUDA for event in profile.events())


def ceilings(device: str) -> Ceilings:
    """Measured here and now, on random data: zeros multiply faster."""
    elements, n = (2**31, 8192) if device != "cpu" else (2**22, 256)
    return Ceilings(copy_gb_s=_copy_gb_s(elements, device), gemm_tflop_s=_gemm_tflop_s(n, device))


def _copy_gb_s(elements: int, device: str) -> float:
    source = torch.randn(elements, dtype=torch.bfloat16, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / _ceiling_ms(lambda: target.copy_(source), device) / 1e6


def _gemm_tflop_s(n: int, device: str) -> float:
    a, b = (torch.randn(n, n, dtype=torch.bfloat16, device=device) for _ in range(2))
    out = torch.empty_like(a)
    return 2 * n**3 / _ceiling_ms(lambda: torch.mm(a, b, out=out), device) / 1e9


def _ceiling_ms(call: Call, device: str) -> float:
    if device == "cpu":
        return _on_cpu(call, 50).ms
    return statistics.median(_event_times(call, 25)[5:])


@dataclass(frozen=True)
class Rate:
    value: float
    unit: str
    percent: float


def rate(ms: float, nbytes: float, flops: float, limits: Ceilings) -> Rate | None:
    """Against the ceiling that binds: the one that a perfect version of this much work would hit."""
    if not nbytes and not flops:
        return None
    gb_s, tflop_s = nbytes / ms / 1e6, flops / ms / 1e9
    if nbytes / limits.copy_gb_s / 1e9 > flops / limits.gemm_tflop_s / 1e12:
        return Rate(gb_s, "GB/s", 100 * gb_s / limits.copy_gb_s)
    return Rate(tflop_s, "TFLOP/s", 100 * tflop_s / limits.gemm_tflop_s)
