"""Compile every kernel for GPUs that are not there, and fail with the names of those that would not run.

    python -m tests.aot                                a cover of the launches of all cases, for all targets
    python -m tests.aot --all                          all launches
    python -m tests.aot --targets gfx942 --ops rope    some of them
    python -m tests.aot --write                        renew the table of docs/hardware.md and benchmark/compiled.json
    python -m tests.aot --launches FILE                only list what would be launched, to compare two commits

Results are kept by the source of the kernel and the version of Triton: a second run compiles what has changed.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import sys
import time
from pathlib import Path

from benchmark.sources import commit
from tests.aot import proof, table
from tests.aot.targets import TARGETS


def parsed(args: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser("python -m tests.aot", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--targets", nargs="+", default=[*TARGETS], choices=TARGETS, metavar="NAME")
    parser.add_argument("--ops", nargs="+", default=[], metavar="OP")
    parser.add_argument("--all", action="store_true", help="every launch, not a cover of them")
    parser.add_argument(
        "--workers", type=int, default=1, help="processes that record and compile (1)"
    )
    parser.add_argument("--cache", type=Path, default=table.ROOT / "build" / "aot.jsonl")
    parser.add_argument("--specs", default=proof.LIBRARY, help=argparse.SUPPRESS)
    parser.add_argument("--write", action="store_true", help="renew the table")
    parser.add_argument("--launches", type=Path, metavar="FILE", help="list launches, compile none")
    return parser.parse_args(args)


def tell(line: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {line}", flush=True)


def main(args: list[str] | None = None) -> int:
    """0; 1 with a line for each fault."""
    given = parsed(args)
    if given.write and (given.ops or given.targets != [*TARGETS]):
        sys.exit("--write takes the whole library and all targets.")
    requests = [
        proof.Request(
            TARGETS[name], tuple(given.ops), given.all or bool(given.launches), given.specs
        )
        for name in given.targets
    ]
    if given.launches:
        lines = [
            f"{request.target.name} {launch.variant} {launch.variant.attributes}"
            for _, found in proof.by_vendor(requests, given.workers, tell)
            for request, recorded in found
            for launch in recorded.launches
        ]
        given.launches.write_text("\n".join(sorted(lines)) + "\n", encoding="utf-8")
        return 0
    proofs = proof.prove(requests, proof.Results(given.cache), given.workers, tell)
    faults = [fault for found in proofs for fault in found.faults()]
    for fault in faults:
        print(fault)
    if given.write:
        version, source = importlib.metadata.version("triton"), commit()
        table.write(table.numbers(proofs, version, source[:10] + source[40:]))
    compiled = sum(len(found.measured) for found in proofs)
    print(f"{compiled} kernels for {len(proofs)} targets, {len(faults)} faults")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
