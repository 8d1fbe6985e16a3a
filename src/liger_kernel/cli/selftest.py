"""`liger_kernel selftest`: the ops' own cases, on this machine.

Beside `bench` the only file that needs the cases and the tolerance of `liger_kernel.testing` outside of tests.
"""

from __future__ import annotations

import contextlib
import os
import time
import warnings
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from typing import Any

import torch

from liger_kernel import backends, utils
from liger_kernel.backends import disabled
from liger_kernel.backends.triton import DEVICE_TYPES, INTERPRET
from liger_kernel.cli.answer import Answer, Table, UserError, said
from liger_kernel.cli.models import DTYPES
from liger_kernel.cli.present import track
from liger_kernel.ops import COMPUTED_BY
from liger_kernel.testing import Make, OpCase, OpSpec, specs
from liger_kernel.testing.calls import assert_as_exact, drawn
from liger_kernel.testing.cases import elements

#: elements of the inputs of a case that the interpreter runs
SMALL = 2**13


@dataclass
class Result:
    """One op by one implementation."""

    op: str
    implementation: str
    passed: int = 0
    failed: int = 0
    why: str = ""  # of the first failure

    @property
    def verdict(self) -> str:
        if self.failed:
            return f"WRONG in {self.failed}: {self.why}"
        return "right" if self.passed else "not run"


@dataclass(frozen=True)
class _Run:
    spec: OpSpec
    case: OpCase
    dtype: torch.dtype
    implementation: str

    @property
    def key(self) -> tuple[str, str]:
        return self.spec.name, self.implementation

    def __str__(self) -> str:
        return f"{self.case.id}, {str(self.dtype).removeprefix('torch.')}"


def implementations(device_type: str) -> list[str]:
    """What serves this machine, the reference first."""
    found = backends.IMPLEMENTATIONS.items()
    serving = [
        n for n, one in found if one.unavailable(device_type) is None and _offers(n, device_type)
    ]
    return [backends.REFERENCE, *serving]


def _offers(name: str, device_type: str) -> bool:
    try:
        return backends.implementation_for(device_type, name) is not None
    except RuntimeError:
        return False


def _has_files(op: str, implementation: str) -> bool:
    if implementation == backends.REFERENCE:
        return True
    files = backends.IMPLEMENTATIONS[implementation].module(COMPUTED_BY.get(op, op))
    return backends.is_there(files)


def runs(
    ops: Sequence[str], dtypes: Sequence[torch.dtype], device_type: str, small: bool
) -> list[_Run]:
    found = []
    for op in ops:
        spec = specs()[op]
        cases = [case for case in spec.cases if not case.large]
        if small:
            cases = [c for c in cases if elements(c) <= SMALL] or [min(cases, key=elements)]
        for implementation in implementations(device_type):
            if _has_files(op, implementation):
                found += [_Run(spec, c, d, implementation) for c in cases for d in dtypes]
    return found


def test(
    ops: Sequence[str], dtypes: Sequence[torch.dtype], device_type: str, small: bool, jobs: int
) -> list[Result]:
    """A result for every op and implementation.

    One process stops where an op has made the device useless. Of many, the others go on, and a new one takes over.
    """
    todo = runs(ops, dtypes, device_type, small)
    results = {key: Result(*key) for key in dict.fromkeys(r.key for r in todo)}
    with _all_enabled():
        parts: Iterable[Result]
        if jobs == 1:
            parts = _tested(track(todo, "selftest", len(todo)), device_type)
        else:
            groups = dict.fromkeys((*r.key, r.dtype) for r in todo)
            parts = _by_processes(list(groups), device_type, small, jobs)
        for part in parts:
            whole = results[part.op, part.implementation]
            whole.passed += part.passed
            whole.failed += part.failed
            whole.why = whole.why or part.why
    return list(results.values())


def _tested(todo: Iterable[_Run], device_type: str) -> list[Result]:
    results: dict[tuple[str, str], Result] = {}
    for run in todo:
        result = results.setdefault(run.key, Result(*run.key))
        try:
            with backends.use_implementation(run.implementation):
                _compare(run, device_type, again=not result.failed)
        except Exception as error:  # whatever a compiler or a driver raises is a verdict
            result.failed += 1
            result.why = result.why or f"{run}: {said(error)}"
            if not _is_alive(device_type):
                break
        else:
            result.passed += 1
    return list(results.values())


_Group = tuple[str, str, torch.dtype]


def _tested_group(group: _Group, device_type: str, small: bool) -> list[Result]:
    """Nothing in a process that has lost its device before."""
    op, implementation, dtype = group
    if not _is_alive(device_type):
        return []
    todo = runs([op], [dtype], device_type, small)
    return _tested([r for r in todo if r.implementation == implementation], device_type)


def _prepare() -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # every process would say the same


def _by_processes(
    groups: list[_Group], device_type: str, small: bool, jobs: int
) -> Iterator[Result]:
    """Most of the time goes to compilers, which use one core each."""
    todo = groups
    while todo:
        lost = []
        with ProcessPoolExecutor(min(jobs, len(todo)), get_context("spawn"), _prepare) as pool:
            futures = {pool.submit(_tested_group, g, device_type, small): g for g in todo}
            for future in track(as_completed(futures), "selftest", len(todo)):
                died = isinstance(future.exception(), BrokenProcessPool)
                found = [] if died else future.result()
                yield from found
                lost += [] if found else [futures[future]]
        if len(lost) == len(todo):
            return
        todo = lost


def _compare(run: _Run, device_type: str, again: bool) -> None:
    """`again`: judge an error close to what is allowed on more draws, which an op known to be wrong can do without."""

    def draw(seed: int) -> Any:
        return drawn(run.spec, run.case, Make(run.dtype, device_type, seed))

    inputs, grads = draw(0)
    assert_as_exact(run.spec, run.case, inputs, grads, draw if again else None)


def _is_alive(device_type: str) -> bool:
    try:
        return float(torch.ones(2, device=device_type).sum()) == 2
    except RuntimeError:
        return False


@contextlib.contextmanager
def _all_enabled() -> Iterator[None]:
    """What is disabled is tested, too."""
    before = os.environ.get(disabled.VARIABLE)
    os.environ[disabled.VARIABLE] = os.devnull
    backends.forget()
    try:
        yield
    finally:
        del os.environ[disabled.VARIABLE]
        if before is not None:
            os.environ[disabled.VARIABLE] = before
        backends.forget()


def record(
    results: Sequence[Result], device_type: str
) -> tuple[list[disabled.Entry], OSError | None]:
    """Write down what is wrong, and strike out what is right now.

    Returns: what is disabled here, and why that could not be written, if so.
    """
    names = {backends.facts_of(device).name for device in backends.devices_of(device_type)}
    ran = {(COMPUTED_BY.get(r.op, r.op), r.implementation) for r in results if r.passed or r.failed}
    kept = [
        e for e in disabled.read() if e.device not in names or (e.op, e.implementation) not in ran
    ]
    new: dict[tuple[str, str], disabled.Entry] = {}
    for result in results:
        if result.failed and result.implementation != backends.REFERENCE:
            op = COMPUTED_BY.get(result.op, result.op)
            for name in names:
                entry = disabled.Entry.here(
                    op, result.implementation, name, f"{result.op}, {result.why}"
                )
                new.setdefault((op, name), entry)
    refused = None
    try:
        disabled.write([*kept, *new.values()])
    except OSError as error:  # the verdicts, which took minutes, are told all the same
        refused = error
    backends.forget()
    return list(new.values()), refused


def _reset() -> Answer:
    path = disabled.path()
    try:
        there = path.is_file()
        disabled.write([])
    except OSError as error:
        raise UserError(f"{path} cannot be removed: {error}") from error
    backends.forget()
    text = f"{path} is removed." if there else f"There is no {path}; no op is disabled."
    if not there and path.exists():
        text = f"{path} is no regular file, and stays; no op is disabled."
    return Answer({"removed": there, "file": str(path)}, [text])


def _chosen(given: Sequence[str] | None, known: Sequence[str], what: str) -> list[str]:
    for name in given or ():
        if name not in known:
            raise UserError(f"unknown {what} {name!r}; known: {', '.join(sorted(known))}")
    return [name for name in known if not given or name in given]


def answer(
    op: Sequence[str] | None, dtype: Sequence[str] | None, interpret: bool, reset: bool, jobs: int
) -> Answer:
    if reset:
        return _reset()
    if interpret and not INTERPRET:
        raise UserError("--interpret came too late: set TRITON_INTERPRET=1 before Python starts")
    try:
        disabled.read()
    except ValueError as error:  # it may be a file of somebody else
        raise UserError(str(error)) from error
    ops = _chosen(op, list(specs()), "op")
    dtypes = [DTYPES[name] for name in _chosen(dtype, list(DTYPES), "dtype")]
    device_type = "cpu" if INTERPRET else utils.infer_device()
    if jobs < 0:
        raise UserError(f"--jobs {jobs}: a number of processes, or 0 for as many as fit")
    if jobs == 0:
        compiling = device_type in DEVICE_TYPES
        jobs = max(1, min(8, (os.cpu_count() or 1) // 2)) if compiling else 1
    started = time.monotonic()
    results = test(ops, dtypes, device_type, INTERPRET, jobs)
    entries, refused = record(results, device_type)
    failed = [r for r in results if r.failed]
    missing = sorted({r.op for r in results if not (r.passed or r.failed)})
    names = sorted({backends.facts_of(d).name for d in backends.devices_of(device_type)})
    rows = [[r.op, r.implementation, str(r.passed + r.failed), r.verdict] for r in results]
    parts: list[Table | str] = [
        Table(f"selftest on {', '.join(names)}", ["op", "computed by", "cases", "verdict"], rows),
        f"{len(results) - len(failed) - len(missing)} of {len(results)} are right, "
        f"after {time.monotonic() - started:.0f} s.",
    ]
    if missing:
        parts.append(
            f"Not run, since the device does not answer any more or a process died: {', '.join(missing)}."
        )
    wrong = ", ".join(sorted({e.op for e in entries})) or "none"
    if refused is not None:
        parts.append(
            f"{disabled.path()} cannot be written ({refused}), so that the ops computed by the reference are those of "
            f"before. They should be: {wrong}. {disabled.VARIABLE} names another file."
        )
    elif entries:
        parts.append(
            f"Computed by the reference from now on: {wrong}. {disabled.path()} says so; {disabled.RESET}"
        )
    data = {
        "devices": names,
        "results": [asdict(r) for r in results],
        "disabled": [] if refused else [asdict(e) for e in entries],
        "refused": None if refused is None else str(refused),
        "file": str(disabled.path()),
    }
    return Answer(data, parts, status=int(bool(failed or missing or refused)))
