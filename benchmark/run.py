"""Time the ops beside their peers.

    python benchmark/run.py rms_norm                        # one op, every provider that is there
    python benchmark/run.py --case 8192x4096 --mode fwd     # every op that has this case
    python benchmark/run.py rms_norm --base main            # and the same op at another commit
    python benchmark/run.py --peer-site /tmp/peers          # pip install --target /tmp/peers --no-deps liger-kernel ...
    python benchmark/run.py rms_norm --device cpu           # tiny cases: does it run at all?

Every provider is first compared with float64; one that is wrong gets no time. What is measured: `measure.py`. Who takes
part: `providers.py`. The rows are merged into benchmark/results/<gpu>.json; `tables.py` and `plots.py` show that file.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import sources  # first of ours: decides which liger_kernel is imported
import torch
from measure import (
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
from providers import PROVIDERS
from results import Row, default_path, describe_run, load, merge, save
from workload import MODES, Workload

from liger_kernel.ops import OPS
from liger_kernel.testing import OpCase, OpSpec

ROW_MARK = "@row "  # a child process reports a row on a line that starts with this
PEER_TIMEOUT = 420


@dataclass(frozen=True)
class Setting:
    device: str
    dtype: torch.dtype
    modes: tuple[str, ...]
    budget_ms: float
    limits: Ceilings
    brief: bool = False  # call times and memory alone


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "positional", nargs="*", metavar="OP", help=f"default: all; known: {', '.join(OPS)}"
    )
    parser.add_argument("--op", dest="ops", action="extend", nargs="+", default=[], help="the same")
    parser.add_argument(
        "--case", nargs="+", default=[], help="ids; default: the large cases (on the CPU the first)"
    )
    parser.add_argument("--providers", default=",".join(PROVIDERS), help="default: %(default)s")
    parser.add_argument("--mode", default=",".join(MODES), help="default: %(default)s")
    parser.add_argument("--dtype", default="bfloat16", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--json", type=Path, help="default: benchmark/results/<gpu>.json")
    parser.add_argument("--peer-site", help="folder with peers, as `pip install --target` makes it")
    parser.add_argument(
        "--sweep", action="store_true", help="the plane of shapes: call times and memory alone"
    )
    parser.add_argument(
        "--base", metavar="REF", help="also measure this commit, as provider `base`"
    )
    parser.add_argument("--quick", action="store_true", help="a third of the repetitions")
    parser.add_argument("--worker", metavar="LABEL", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    args.ops += args.positional
    for name, given, known in (
        ("op", args.ops, OPS),
        ("provider", args.providers.split(","), PROVIDERS),
        ("mode", args.mode.split(","), MODES),
    ):
        unknown = sorted(set(given) - set(known))
        if unknown:
            parser.error(f"unknown {name} {', '.join(unknown)}; known: {', '.join(known)}")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("torch sees no GPU; --device cpu checks the runner itself on tiny cases")
    return args


Pairs = list[tuple[OpSpec, OpCase]]


def chosen(ops: list[str], ids: list[str], device: str, sweep: bool = False) -> Pairs:
    """By default what the GPU can be measured on; on the CPU the first case of each op, which is small."""
    found = []
    for op in ops or OPS:
        spec: OpSpec = importlib.import_module(f"liger_kernel.ops.{op}.cases").SPEC
        large = [case for case in spec.cases if case.large and case.sweep == sweep]
        default = large if device == "cuda" else spec.cases[:1]
        cases = [case for case in spec.cases if case.id in ids] if ids else default
        found += [(spec, case) for case in cases]
    missing = set(ids) - {case.id for _, case in found}
    if missing:
        raise SystemExit(f"no case {', '.join(sorted(missing))} in {', '.join(ops or OPS)}")
    return found


def measure_provider(
    work: Workload, name: str, label: str, setting: Setting, bound: dict[str, Any]
) -> Iterator[Row]:
    """One row per mode; one row with "error" where the provider fails or is wrong. Nothing for what it does not do.

    What is measured goes to `bound` too.
    """
    key = {
        "op": work.spec.name,
        "case": work.case.id,
        "dtype": str(setting.dtype).split(".")[1],
        "provider": label,
    }
    try:
        function = PROVIDERS[name].bind(work.spec, work.case)
        if function is None:
            return
        bound[label] = function
        ours = name == "ours"
        try:
            compared = work.check(function, exact_dtype=ours)
        except AssertionError as error:
            if ours:
                raise AssertionError(f"wrong numbers, so no speed: {error}") from error
            compared = f"worse than the rule allows: {error}"  # what others ship is shown as it is, with a mark
        for mode in setting.modes:
            try:
                yield {
                    **key,
                    "mode": mode,
                    "compared": compared,
                    **_measured(work, function, mode, setting),
                }
            except Exception as error:
                yield {**key, "mode": mode, "compared": compared, "error": _said(error)}
    except Exception as error:
        yield from ({**key, "mode": mode, "error": _said(error)} for mode in setting.modes)


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
            print(f"second turn of {line(row)}: {_said(error)}; the first stands", file=sys.stderr)
            continue
        finally:
            release()
        if timing.ms < row["ms"]:
            share = {} if row.get("gpu_ms") else _rate(work, row["mode"], timing.ms, setting)
            yield {**row, **asdict(timing), **share}


def host_bound(row: Row) -> bool:
    """Whether a call from the host takes clearly longer than its kernels."""
    return bool(row.get("gpu_ms")) and row["ms"] > 1.2 * row["gpu_ms"]


def _said(error: Exception) -> str:
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0] if text else ''}"[:300]


def _measured(work: Workload, function: Any, mode: str, setting: Setting) -> Row:
    (call,) = work.calls(function, mode)
    if mode == "bwd":
        try:  # right the first time, as the comparison has shown
            call(), call()
        except RuntimeError as error:
            return {"ms": None, "note": f"one backward only: {_said(error)}"}
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


def measure_here(
    pairs: Pairs, names: list[str], setting: Setting, label: str | None
) -> Iterator[Row]:
    """The providers of this process, case by case; a row that comes again replaces the first."""
    for spec, case in pairs:
        try:
            work = Workload(spec, case, setting.dtype, setting.device)
        except Exception as error:
            yield problem(label or "ours", f"no inputs for {spec.name} {case.id}: {_said(error)}")
            continue
        rows: list[Row] = []
        bound: dict[str, Any] = {}
        for name in names:
            for row in measure_provider(work, name, label or name, setting, bound):
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


def measure_in_child(
    args: argparse.Namespace, name: str, label: str, source: Path | None
) -> Iterator[Row]:
    """A provider in a process of its own: one that shares our import name, or our own code at another commit."""
    command = [
        sys.executable,
        str(Path(__file__).resolve()),
        *args.ops,
        "--providers",
        name,
        "--worker",
        label,
    ]
    command += ["--mode", args.mode, "--dtype", args.dtype, "--device", args.device]
    command += ["--case", *args.case] if args.case else []
    command += ["--peer-site", args.peer_site] if args.peer_site else []
    command += ["--quick"] if args.quick else []
    command += ["--sweep"] if args.sweep else []
    environment = {**os.environ, **({"LIGER_KERNEL_SOURCE": str(source)} if source else {})}
    rows = 0
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        for line in child.stdout:
            if line.startswith(ROW_MARK):
                rows += 1
                yield json.loads(line.removeprefix(ROW_MARK))
            else:
                sys.stderr.write(line)
    if child.returncode:
        yield problem(label, f"its process ended with code {child.returncode} after {rows} rows")


def problem(label: str, reason: str) -> Row:
    """A row that belongs to no case: it is shown and counted, but not kept."""
    return {"op": "-", "case": "-", "mode": "-", "provider": label, "error": reason}


def worker(args: argparse.Namespace, setting: Setting) -> int:
    """The other end of `measure_in_child`."""
    (name,) = args.providers.split(",")
    provider = PROVIDERS[name]
    pairs = chosen(
        args.ops, args.case, setting.device, args.sweep
    )  # ours, for inputs and truth, before the name changes hands
    if provider.package is not None:
        sources.become_peer(provider.package, args.peer_site)
    version = sources.version(provider.distribution) if provider.distribution else None
    for row in measure_here(pairs, [name], setting, args.worker):
        row = {**row, "version": version} if version else row
        print(ROW_MARK + json.dumps(row), flush=True)
    return 0


def all_rows(args: argparse.Namespace, setting: Setting) -> Iterator[Row]:
    wanted = args.providers.split(",")
    pairs = chosen(args.ops, args.case, setting.device, args.sweep)
    yield from measure_here(
        pairs, [n for n in wanted if PROVIDERS[n].package is None], setting, None
    )
    release()  # the peers need the memory
    for name in wanted:
        package = PROVIDERS[name].package
        if package is not None and sources.has_package(package, args.peer_site):
            yield from measure_in_child(args, name, name, None)
        elif package is not None:
            print(
                f"{name}: no package {package} (--peer-site names a folder that holds it)",
                file=sys.stderr,
            )
    if args.base:
        with sources.worktree(args.base) as tree:
            yield from measure_in_child(args, "ours", "base", tree / "src")


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


def keep(path: Path, run: dict[str, Any], rows: list[Row]) -> None:
    save(path, merge(load(path), "ops", run, [row for row in rows if row["op"] != "-"]))


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
    if args.worker:
        return worker(args, setting)
    run = describe_run(args.device, **asdict(setting.limits))
    print(", ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in run.items()))
    rows = []
    path = args.json or default_path(args.device)
    for row in all_rows(args, setting):
        print(line(row), flush=True)
        rows.append(row)
        keep(path, run, rows)
    if setting.device == "cuda" and not setting.brief:
        count_launches(chosen(args.ops, args.case, args.device), rows, setting)
        keep(path, run, rows)
    failed = [row for row in rows if "error" in row and row["provider"] in ("ours", "-")]
    kept = {(row["op"], row["case"], row["mode"], row["provider"]) for row in rows}
    print(f"{len(kept)} rows in {path}; {len(failed)} failures of ours")
    return 1 if failed or not rows else 0


if __name__ == "__main__":
    sys.exit(main())
