"""The whole proof: records what each GPU would launch, compiles what is not known yet, and says what is wrong.

A process can pretend to be of one vendor only, since kernels read that when they are imported. So all of it happens in
worker processes, which this one never imports a kernel for.
"""

from __future__ import annotations

import hashlib
import importlib
import itertools
import json
import multiprocessing
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from tests.aot import build, record
from tests.aot.build import Measured
from tests.aot.cover import cover
from tests.aot.record import Variant
from tests.aot.targets import Target

#: where `specs()` tells the cases of the library
LIBRARY = "liger_kernel.testing"
Tell = Callable[[str], None]


@dataclass(frozen=True)
class Request:
    """What to prove: the cases of `ops` (all if empty) of a module's `specs()`, every launch or a `cover` of them."""

    target: Target
    ops: tuple[str, ...] = ()
    everything: bool = False
    specs: str = LIBRARY


@dataclass(frozen=True)
class Launch:
    """A variant for a target, the case that asked for it, and the name of its result."""

    variant: Variant
    target: Target
    case: str
    key: str


@dataclass(frozen=True)
class Recorded:
    launches: list[Launch]  # that are to be compiled
    variants: int  # that there are
    idle: list[str]  # kernels that no case launches


def start_worker(vendor: str) -> None:
    os.environ.pop("TRITON_INTERPRET", None)
    os.nice(10)
    record.pretend(vendor)


def ops_of(request: Request) -> list[str]:
    """In a worker, as the next two."""
    specs = importlib.import_module(request.specs).specs()
    if unknown := sorted(set(request.ops) - specs.keys()):
        raise ValueError(f"Unknown ops {unknown}; known: {', '.join(specs)}.")
    return [name for name in specs if not request.ops or name in request.ops]


def launches(request: Request, op: str, dtype: torch.dtype) -> dict[Variant, str]:
    specs = importlib.import_module(request.specs).specs()
    return record.launches(request.target, specs[op], dtype)


def recorded(request: Request, found: dict[Variant, str]) -> Recorded:
    chosen = list(found) if request.everything else cover(found, request.target.meet)
    launches = [Launch(v, request.target, found[v], key_of(v, request.target)) for v in chosen]
    idle = [] if request.ops else record.never_launched(found, request.target.name)
    return Recorded(launches, len(found), idle)


def key_of(variant: Variant, target: Target) -> str:
    import triton

    sources = build.sources(build.kernel_of(variant))
    key = repr((triton.__version__, sorted(sources.items()), variant, target.name))
    return hashlib.sha256(key.encode()).hexdigest()[:24]


class Results:
    """What was measured, by key: one line of JSON each, so that a run that was stopped goes on."""

    def __init__(self, path: Path | None):
        self.path = path
        self.known: dict[str, Measured] = {}
        if path is not None and path.exists():
            for line in path.read_text().splitlines():
                key, found = json.loads(line)
                self.known[key] = Measured(**{**found, "foreign": tuple(found["foreign"])})

    def add(self, key: str, measured: Measured) -> None:
        self.known[key] = measured
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a") as file:
                file.write(json.dumps([key, asdict(measured)]) + "\n")


def pool(vendor: str, workers: int) -> ProcessPoolExecutor:
    context = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(workers, context, start_worker, (vendor,))


def measure_all(
    launches: Iterable[Launch], results: Results, executor: ProcessPoolExecutor, tell: Tell
) -> None:
    """Compile, in workers of one vendor, what `results` do not know."""
    left = list({x.key: x for x in launches if x.key not in results.known}.values())
    for at, (launch, measured) in enumerate(_measured(left, executor), 1):
        results.add(launch.key, measured)
        if at % 100 == 0 or at == len(left):
            tell(f"{at} of {len(left)} compiled")


def _measured(
    launches: list[Launch], executor: ProcessPoolExecutor
) -> Iterator[tuple[Launch, Measured]]:
    """A compiler that takes its process with it is an error of the kernel that it compiled."""
    futures: dict[Future[Measured], Launch] = {}
    broken = []
    for launch in launches:
        futures[executor.submit(build.build, launch.variant, launch.target)] = launch
    for future in as_completed(futures):
        try:
            yield futures[future], future.result()
        except BrokenProcessPool:
            broken.append(futures[future])
    while broken:  # by one worker in their order: the first without a result is the one that did it
        with pool(broken[0].target.vendor, 1) as alone:
            again = [alone.submit(build.build, x.variant, x.target) for x in broken]
            for launch, result in zip(tuple(broken), again, strict=True):
                broken.remove(launch)
                try:
                    yield launch, result.result()
                except BrokenProcessPool:
                    yield launch, Measured(error="the compiler ended its process")
                    break


@dataclass(frozen=True)
class Proof:
    """What was found for one target."""

    target: Target
    recorded: Recorded
    measured: list[tuple[Launch, Measured]]

    def faults(self) -> list[str]:
        """One line for each kernel, case and fault."""
        found = [f"{self.target.name}: no case launches {name}" for name in self.recorded.idle]
        for launch, measured in self.measured:
            variant = launch.variant
            for fault in build.faults(measured, variant.name, self.target):
                found.append(f"{self.target.name}: {launch.case}: {variant}: {fault}")
        return found

    def worst(self) -> dict[str, dict[str, Any]]:
        """Of each kernel, how many variants were compiled, and the most that one of them takes."""
        kernels: dict[str, dict[str, Any]] = {}
        for launch, measured in self.measured:
            kernel = kernels.setdefault(launch.variant.name, {"compiled": 0})
            kernel["compiled"] += not measured.error
            for name in ("shared_memory", "threads", "registers", "spilled"):
                kernel[name] = max(kernel.get(name, 0), getattr(measured, name))
        return dict(sorted(kernels.items()))


def by_vendor(
    requests: list[Request], workers: int, tell: Tell
) -> Iterator[tuple[ProcessPoolExecutor, list[tuple[Request, Recorded]]]]:
    """What the targets of a vendor would launch, and the workers that told it."""
    for vendor in sorted({r.target.vendor for r in requests}):
        here = [r for r in requests if r.target.vendor == vendor]
        with pool(vendor, workers) as executor:
            ops = executor.map(ops_of, here)
            parts = [
                (request, op, dtype)
                for request, names in zip(here, ops, strict=True)
                for op, dtype in itertools.product(names, record.DTYPES)
            ]
            launched: dict[Request, dict[Variant, str]] = {request: {} for request in here}
            for (request, *_), part in zip(
                parts, executor.map(launches, *zip(*parts, strict=True)), strict=True
            ):
                launched[request] = part | launched[request]  # the first case of each
            chosen = executor.map(recorded, here, launched.values())
            found = list(zip(here, chosen, strict=True))
            for request, what in found:
                tell(f"{request.target.name}: {len(what.launches)} of {what.variants} launches")
            yield executor, found


def prove(
    requests: list[Request], results: Results, workers: int = 1, tell: Tell = lambda line: None
) -> list[Proof]:
    """A proof for each request, in their order."""
    proofs: dict[Request, Proof] = {}
    for executor, found in by_vendor(requests, workers, tell):
        measure_all((x for _, what in found for x in what.launches), results, executor, tell)
        for request, what in found:
            measured = [(x, results.known[x.key]) for x in what.launches]
            proofs[request] = Proof(request.target, what, measured)
    return [proofs[request] for request in requests]
