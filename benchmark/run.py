"""Time the ops beside their peers.

    python -m benchmark run rms_norm                        # one op, every provider that is there
    python -m benchmark run --case 8192x4096 --mode fwd     # every op that has this case
    python -m benchmark run rms_norm --base main            # and the same op at another commit
    python -m benchmark run --peer-site /tmp/peers          # pip install --target /tmp/peers --no-deps liger-kernel ...
    python -m benchmark run rms_norm --device cpu           # tiny cases: does it run at all?

Every provider is first compared with float64; one that is wrong gets no time. What is measured: `measure.py`. Who takes
part: `providers.py`. The rows are merged into benchmark/results/<gpu>.json; `tables` and `plots` show that file.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch

from benchmark import children, sources
from benchmark.measure import (
    Ceilings,
    NotCapturable,
    allocations,
    ceilings,
    copies_beyond_cache,
    gpu_only,
    host_inclusive,
    launches,
    peak_mb,
    rate,
    release,
)
from benchmark.options import MeasuringParser
from benchmark.providers import PROVIDERS
from benchmark.results import Row, default_path, describe_run, keep, said
from benchmark.workload import MODES, Workload
from liger_kernel.testing import OpCase, OpSpec, specs


@dataclass(frozen=True)
class Setting:
    device: str
    dtype: torch.dtype
    modes: tuple[str, ...]
    budget_ms: float
    limits: Ceilings
    brief: bool = False  # call times and memory alone


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = MeasuringParser("run", __doc__, "json", "base", "peer-site")
    add, ops = parser.add_argument, specs()
    add("positional", nargs="*", metavar="OP", help=f"default: all; known: {', '.join(ops)}")
    add("--op", dest="ops", action="extend", nargs="+", default=[], help="the same")
    add("--case", nargs="+", default=[], help="ids; default: the large ones (on the CPU the first)")
    everybody = ",".join(name for name in PROVIDERS if name != "base")
    add("--providers", default=everybody, help="default: %(default)s")
    add("--mode", default=",".join(MODES), help="default: %(default)s")
    add("--dtype", default="bfloat16", choices=("float32", "bfloat16", "float16"))
    add("--sweep", action="store_true", help="the plane of shapes: call times and memory alone")
    add("--quick", action="store_true", help="a third of the repetitions")
    args = parser.read(argv)
    args.ops += args.positional
    parser.only("op", args.ops, ops)
    args.providers = parser.listed(args, "provider", args.providers, PROVIDERS)
    parser.only("mode", args.mode.split(","), MODES)
    if missing := set(args.case) - {case.id for _, case in chosen(args)}:
        parser.error(f"no case {', '.join(sorted(missing))} in {', '.join(args.ops or ops)}")
    return args


Pairs = list[tuple[OpSpec, OpCase]]


def chosen(args: argparse.Namespace) -> Pairs:
    """By default what the GPU can be measured on; on the CPU the first case of each op, which is small."""
    found = []
    for spec in [specs()[op] for op in args.ops or specs()]:
        large = [case for case in spec.cases if case.large and case.sweep == args.sweep]
        default = large if args.device == "cuda" else spec.cases[:1]
        cases = [case for case in spec.cases if case.id in args.case] if args.case else default
        found += [(spec, case) for case in cases]
    return found


def measure_provider(
    work: Workload, name: str, setting: Setting, bound: dict[str, Any]
) -> Iterator[Row]:
    """One row per mode; one row with "error" where the provider fails or is wrong. Nothing for what it does not do.

    What is measured goes to `bound` too.
    """
    dtype = str(setting.dtype).split(".")[1]
    key = {"op": work.spec.name, "case": work.case.id, "dtype": dtype, "provider": name}
    try:
        function = PROVIDERS[name].bind(work.spec, work.case)
        if function is None:
            return
        bound[name] = function
        ours = name in ("ours", "base")
        try:
            key["compared"] = work.check(function, exact_dtype=ours)
        except AssertionError as error:
            if ours:
                raise AssertionError(f"wrong numbers, so no speed: {error}") from error
            key["compared"] = (
                f"worse than the rule allows: {error}"  # what others ship is shown, with a mark
            )
        for mode in setting.modes:
            try:
                yield {**key, "mode": mode, **_measured(work, function, mode, setting)}
            except Exception as error:
                yield {**key, "mode": mode, "error": said(error)}
    except Exception as error:
        yield from ({**key, "mode": mode, "error": said(error)} for mode in setting.modes)


def second_turn(
    work: Workload, rows: list[Row], bound: dict[str, Any], setting: Setting
) -> Iterator[Row]:
    """Time `rows` that depend on the moment again, the last one first; those that came out better.

    A card at its power limit gets slower and faster by 5 % within minutes, the host of a virtual machine by a factor of
    three within seconds, and it would be luck who runs when.
    """
    for row in reversed(rows):
        if row.get("ms") is None or not (work.case.flops or host_bound(row)):
            continue
        try:
            (call,) = work.calls(bound[row["provider"]], row["mode"])
            timing = host_inclusive(call, setting.device, setting.budget_ms)
            del call
        except Exception as error:
            print(f"second turn of {line(row)}: {said(error)}; the first stands", file=sys.stderr)
            continue
        finally:
            release()
        if timing.ms < row["ms"]:
            share = {} if row.get("gpu_ms") else _rate(work, row["mode"], timing.ms, setting)
            yield {**row, **asdict(timing), **share}


def host_bound(row: Row) -> bool:
    """Whether a call from the host takes clearly longer than its kernels."""
    return bool(row.get("gpu_ms")) and row["ms"] > 1.2 * row["gpu_ms"]


def _measured(work: Workload, function: Any, mode: str, setting: Setting) -> Row:
    (call,) = work.calls(function, mode)
    if mode == "bwd":
        try:  # right the first time, as the comparison has shown
            call(), call()
        except RuntimeError as error:
            return {"ms": None, "note": f"one backward only: {said(error)}"}
    timing = host_inclusive(call, setting.device, setting.budget_ms)
    row: Row = asdict(timing)
    best = timing.ms
    if setting.device == "cuda":
        row.update(peak_mb=peak_mb(call))
    if setting.device == "cuda" and not setting.brief:
        row.update(allocations=allocations(call))
        del call
        try:
            copies = copies_beyond_cache(work.input_bytes())
            row["gpu_ms"] = best = gpu_only(
                lambda: work.calls(function, mode, copies), timing.ms, row["peak_mb"]
            ).ms
        except NotCapturable as reason:
            row["gpu_ms"], row["gpu_note"] = None, str(reason)
    return {**row, **_rate(work, mode, best, setting)}


def _rate(work: Workload, mode: str, ms: float, setting: Setting) -> Row:
    reached = rate(ms, *work.work(mode), setting.limits)
    if reached is None:
        return {}
    return {"rate": reached.value, "unit": reached.unit, "percent_of_ceiling": reached.percent}


def measure_here(pairs: Pairs, names: list[str], setting: Setting) -> Iterator[Row]:
    """The providers of this process, case by case; a row that comes again replaces the first."""
    for spec, case in pairs:
        try:
            work = Workload(spec, case, setting.dtype, setting.device)
        except Exception as error:
            yield problem("ours", f"no inputs for {spec.name} {case.id}: {said(error)}")
            continue
        rows: list[Row] = []
        bound: dict[str, Any] = {}
        for name in names:
            for row in measure_provider(work, name, setting, bound):
                rows.append(row)
                yield row
            release()
        yield from second_turn(work, rows, bound, setting)


def count_launches(pairs: Pairs, rows: list[Row], setting: Setting) -> None:
    """Add "launches" to our rows. After all times are taken: the profiler stays attached to its process."""
    missing = {
        (row["op"], row["case"], row["mode"]): row
        for row in rows
        if row["provider"] == "ours" and "allocations" in row
    }
    for spec, case in pairs:
        found = {mode: missing.get((spec.name, case.id, mode)) for mode in setting.modes}
        if any(found.values()):
            work = Workload(spec, case, setting.dtype, setting.device)
            function = PROVIDERS["ours"].bind(spec, case)
            for mode, row in found.items():
                if row is not None and function is not None:
                    (call,) = work.calls(function, mode)
                    call()
                    row["launches"] = launches(call)


def measure_peer(
    report: children.Report, args: argparse.Namespace, name: str, site: str | None, setting: Setting
) -> None:
    """In a process of its own: a provider from a package, which may have our import name."""
    pairs = chosen(args)  # ours, for inputs and truth, before the name changes hands
    provider = PROVIDERS[name]
    assert provider.package is not None
    sources.become(site, provider.package)
    version = sources.version(provider.distribution) if provider.distribution else None
    for row in measure_here(pairs, [name], setting):
        report({**row, "version": version} if version else row)


def measure_in_child(args: argparse.Namespace, name: str, setting: Setting) -> Iterator[Row]:
    package = PROVIDERS[name].package
    assert package is not None
    with sources.folder_of(name, args.peer_site, args.base) as site:
        if sources.has_package(package, site):
            try:
                yield from children.rows(measure_peer, args, name, site, setting)
            except children.ChildError as error:
                yield problem(name, str(error))
        else:
            hint = "--peer-site names a folder that holds it"
            print(f"{name}: no package {package} ({hint})", file=sys.stderr)


def problem(provider: str, reason: str) -> Row:
    """A row that belongs to no case: it is shown and counted, but not kept."""
    return {"op": "-", "case": "-", "mode": "-", "provider": provider, "error": reason}


def all_rows(args: argparse.Namespace, setting: Setting) -> Iterator[Row]:
    here = [name for name in args.providers if PROVIDERS[name].package is None]
    yield from measure_here(chosen(args), here, setting)
    release()  # the peers need the memory
    for name in args.providers:
        if name not in here:
            yield from measure_in_child(args, name, setting)


def line(row: Row) -> str:
    name = f"{row['op']:28} {row['case']:22} {row['mode']:5} {row['provider']:8}"
    if "error" in row:
        return f"{name} {row['error']}"
    if row["ms"] is None:
        return f"{name} {row['note']}"
    parts = [f"{row['ms']:9.4f} ms"]
    if "allocations" in row:
        gpu = f"{row['gpu_ms']:9.4f}" if row["gpu_ms"] else "      n/a"
        parts += [f"GPU {gpu}", f"{row['peak_mb']:9.1f} MB"]
        parts += [f"{row['allocations']:3} allocations"]
    elif "peak_mb" in row:
        parts += [f"{row['peak_mb']:9.1f} MB"]
    if "rate" in row:
        parts += [f"{row['rate']:8.1f} {row['unit']} {row['percent_of_ceiling']:5.1f} %"]
    if row["compared"].startswith("worse"):
        parts += ["(inexact)"]
    return "  ".join([name, *parts])


def main(argv: list[str] | None = None) -> int:
    args = arguments(argv)
    setting = Setting(
        device=args.device,
        dtype=getattr(torch, args.dtype),
        modes=tuple(args.mode.split(",")),
        budget_ms=(100 if args.device == "cuda" else 10) / (3 if args.quick else 1),
        limits=ceilings(args.device),
        brief=args.sweep,
    )
    run = describe_run(args.device, **asdict(setting.limits))
    print(", ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in run.items()))
    rows = []
    path = args.json or default_path(args.device)
    for row in all_rows(args, setting):
        print(line(row), flush=True)
        rows.append(row)
        if row["op"] != "-":
            keep(path, "ops", run, [row])
    if setting.device == "cuda" and not setting.brief:
        count_launches(chosen(args), rows, setting)
        keep(path, "ops", run, [row for row in rows if row["op"] != "-"])
    failed = [row for row in rows if "error" in row and row["provider"] in ("ours", "-")]
    kept = {(row["op"], row["case"], row["mode"], row["provider"]) for row in rows}
    print(f"{len(kept)} rows in {path}; {len(failed)} failures of ours")
    return 1 if failed or not rows else 0
