"""The generated part of docs/hardware.md, and the numbers behind it in benchmark/compiled.json."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.aot.proof import Proof
from tests.aot.targets import KIB

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "hardware.md"
NUMBERS = ROOT / "benchmark" / "compiled.json"
BETWEEN = re.compile(r"(?<=<!-- aot -->\n).*?(?=<!-- /aot -->)", re.DOTALL)


def numbers(proofs: Sequence[Proof], triton: str, source: str) -> dict[str, Any]:
    """What is kept: of each target its limits, and of each kernel the worst values."""
    return {
        "triton": triton,
        "commit": source,
        "targets": {
            proof.target.name: {
                "gpu": proof.target.gpu,
                "limit": proof.target.shared_memory,
                "variants": proof.recorded.variants,
                "compiled": len(proof.measured),
                "faults": len(proof.faults()),
                "kernels": proof.worst(),
            }
            for proof in proofs
        },
    }


def cell(kernel: dict[str, int] | None) -> str:
    if kernel is None:
        return ""
    shared = -(-kernel["shared_memory"] // KIB)
    spilled = f" / **{kernel['spilled']}**" if kernel["spilled"] else ""
    return f"{shared} / {kernel['registers']}{spilled}"


def row(*cells: object) -> str:
    return f"| {' | '.join(map(str, cells))} |"


def table(found: dict[str, Any]) -> str:
    """A row for each kernel, a column for each target."""
    targets = found["targets"]
    kernels = sorted({name for target in targets.values() for name in target["kernels"]})
    lines = [
        f"Triton {found['triton']}, commit {found['commit']}. A cell holds the most that any compiled launch of the "
        "kernel takes: KiB of shared memory / registers of a thread / **bytes of a thread that were spilled**, if any.",
        "",
        row("kernel", *targets),
        row(*["---"] * (1 + len(targets))),
        row("GPU", *(target["gpu"] for target in targets.values())),
        row("KiB of shared memory there are", *(t["limit"] // KIB for t in targets.values())),
        row("launches that differ", *(target["variants"] for target in targets.values())),
        row("compiled", *(target["compiled"] for target in targets.values())),
        row("faults", *(target["faults"] for target in targets.values())),
    ]
    for name in kernels:
        cells = (cell(target["kernels"].get(name)) for target in targets.values())
        lines.append(row(f"`{name.removeprefix('ops.')}`", *cells))
    return "\n".join(lines) + "\n"


def write(found: dict[str, Any], page: Path = PAGE, kept: Path = NUMBERS) -> None:
    text = page.read_text(encoding="utf-8")
    if not BETWEEN.search(text):
        raise ValueError(f"{page} has no place for the table: <!-- aot --> and <!-- /aot -->")
    page.write_text(BETWEEN.sub(lambda _: table(found), text), encoding="utf-8")
    kept.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
