"""What the processes of `benchmark.children` run in its tests: a file of its own, so that they start without torch."""

from __future__ import annotations

import os
from pathlib import Path

from benchmark import children


def in_steps(report: children.Report, file: Path, name: str, count: int) -> None:
    for step in range(count):
        with file.open("a") as log:
            log.write(f"{name}{step} ")
        report(step)
    print("done")


def fails(report: children.Report, how: str) -> None:
    report("one")
    if how == "raises":
        raise ValueError("two")
    os._exit(3)
