"""Turn a file of results into Markdown tables.

    python benchmark/tables.py benchmark/results/nvidia-h100-80gb-hbm3.json  # print them
    python benchmark/tables.py benchmark/results/nvidia-h100-80gb-hbm3.json README.md  # and renew them in these files

A file takes the tables between `<!-- benchmark:KIND -->` and `<!-- /benchmark:KIND -->`; KIND is `ops`, `e2e`, `host`,
`chunked`, `head` (time and memory of the fused loss, without the sweep) or the name of an op.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from results import KEYS, Row, load

PROVIDER_ORDER = ("ours", "base", "eager", "torch", "compile", "liger", "cce", "quack")
LOSS_HEAD = "fused_linear_cross_entropy"
MODE_ORDER = ("fwd", "bwd", "full")
E2E_ORDER = ("stock", "patched", "incumbent", "compile", "patched+compile")
LEGEND = (
    "Milliseconds of a call from the host with cold caches, in parentheses of its kernels alone (replayed CUDA graph); "
    "bold: the fastest call. Rate and share of the ceiling (device copy or bf16 matrix product, measured in the same "
    "process) are those of our kernels. † less exact than our rule allows."
)


def markdown(header: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    header = list(header)
    lines = [header, ["---"] * len(header), *(list(row) for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def time_cell(row: Row | None, fastest: float | None) -> str:
    if row is None:
        return ""
    gpu = f" ({row['gpu_ms']:.3g})" if row.get("gpu_ms") else ""
    if row.get("ms") is None:
        return "fails" if "error" in row else gpu.strip() or "-"
    text = f"{row['ms']:.3g}" if row["ms"] < 100 else f"{row['ms']:.0f}"
    text = f"**{text}**" if row["ms"] == fastest else text
    return text + gpu + ("†" if row.get("compared", "").startswith("worse") else "")


def op_table(rows: list[Row]) -> str:
    """One op: a line per case and mode, a column per provider."""
    providers = [p for p in PROVIDER_ORDER if any(row["provider"] == p for row in rows)]
    cells = {(row["case"], row["dtype"], row["mode"], row["provider"]): row for row in rows}
    cases = sorted({(row["case"], row["dtype"]) for row in rows})
    body = []
    for case, dtype in cases:
        for mode in MODE_ORDER:
            line = {p: cells.get((case, dtype, mode, p)) for p in providers}
            times = [row["ms"] for row in line.values() if row and row.get("ms") is not None]
            if not times and not any(row and row.get("gpu_ms") for row in line.values()):
                continue
            ours = line.get("ours") or {}
            reached = (
                f"{ours['rate']:.0f} {ours['unit']}, {ours['percent_of_ceiling']:.0f} %"
                if "rate" in ours
                else ""
            )
            memory = "/".join(
                f"{row['peak_mb']:.0f}" if row and "peak_mb" in row else "-"
                for row in line.values()
            )
            name = case if dtype == "bfloat16" else f"{case} {dtype}"
            body.append(
                [
                    name,
                    mode,
                    *(time_cell(line[p], min(times, default=None)) for p in providers),
                    reached,
                    memory,
                ]
            )
    return markdown(
        ["case", "", *providers, "rate of ours", "peak MB, " + "/".join(providers)], body
    )


def ops_tables(content: dict[str, Any], only: str | None = None) -> str:
    names = [name for name in sorted({row["op"] for row in content["ops"]}) if only in (None, name)]
    parts = [
        f"**{name}**\n\n{op_table([r for r in content['ops'] if r['op'] == name])}"
        for name in names
    ]
    return "\n\n".join([*parts, LEGEND, provenance(content, "ops")]) if parts else "No results."


def head_table(content: dict[str, Any]) -> str:
    """Forward and backward of the fused loss: milliseconds / MB above the inputs."""
    rows = [r for r in content["ops"] if (r["op"], r["mode"]) == (LOSS_HEAD, "full")]
    cases = [r["case"] for r in rows if r["provider"] == "ours" and "allocations" in r]
    providers = [p for p in PROVIDER_ORDER[2:] if any(r["provider"] == p for r in rows)]
    cells = {(r["case"], r["provider"]): r for r in rows}

    def cell(row: Row | None, fastest: float) -> str:
        if row is None or row.get("ms") is None:
            return (
                "" if row is None else "out of memory" if "OutOfMemory" in row["error"] else "fails"
            )
        text = f"{row['ms']:.3g} ms / {row['peak_mb']:,.0f} MB"
        return f"**{text}**" if row["ms"] == fastest else text

    body = []
    for case in sorted(cases):
        line = [cells.get((case, provider)) for provider in ("ours", *providers)]
        fastest = min(row["ms"] for row in line if row and row.get("ms") is not None)
        body.append([case, *(cell(row, fastest) for row in line)])
    return markdown(["tokens x hidden x vocabulary", "ours", *providers], body)


def e2e_table(content: dict[str, Any]) -> str:
    rows = content["e2e"]
    modes = [m for m in E2E_ORDER if any(row["mode"] == m for row in rows)]
    cells = {tuple(row[k] for k in KEYS["e2e"]): row for row in rows}
    body = []
    for key in sorted({tuple(row[k] for k in KEYS["e2e"][:-1]) for row in rows}, key=str):
        shape, seq, batch, checkpointing, ignored = key
        line = [cells.get((*key, mode)) for mode in modes]
        speeds = [row["tokens_per_s"] for row in line if row and "tokens_per_s" in row]
        steps = max((row.get("steps", 0) for row in line if row), default=0)
        name = f"{shape}, S{seq} B{batch}" + (", checkpointing" if checkpointing else "")
        name += f", {ignored:.0%} of the labels ignored" if ignored else ""
        body.append([name, *(e2e_cell(row, max(speeds, default=0), steps) for row in line)])
    if not body:
        return "No results."
    note = "Tokens per second, peak memory, loss of the last step (same data, same seed)."
    return "\n\n".join([markdown(["model", *modes], body), note, provenance(content, "e2e")])


def e2e_cell(row: Row | None, best: float, steps: int) -> str:
    """A loss after fewer than `steps` steps is another loss, and says so."""
    if row is None or "tokens_per_s" not in row:
        return "" if row is None else "fails"
    speed = f"{row['tokens_per_s']:,.0f}"
    speed = f"**{speed}**" if row["tokens_per_s"] == best else speed
    memory = "" if row["peak_gb"] is None else f" / {row['peak_gb']:.1f} GB"
    after = f" (step {row['steps']})" if row.get("steps", steps) != steps else ""
    return f"{speed}{memory} / {row['loss']:.4f}{after}"


def host_table(content: dict[str, Any]) -> str:
    """Microseconds that Python is busy, forward / backward."""
    cells = {(row["op"], row["case"], row["provider"]): row for row in content["host"]}
    columns = ("ours", "kernels", "one thread", "eager")

    def cell(row: Row | None) -> str:
        return "" if row is None else f"{row['fwd_us']:.0f} / {row['bwd_us']:.0f}"

    body = [
        [op, case, *(cell(cells.get((op, case, column))) for column in columns)]
        for op, case in sorted({key[:2] for key in cells})
    ]
    if not body:
        return "No results."
    return "\n\n".join([markdown(["op", "case", *columns], body), provenance(content, "host")])


def chunked_table(content: dict[str, Any]) -> str:
    """Forward and backward of the losses on log-probabilities."""
    rows = content["chunked"]
    cells = {(row["loss"], row["case"], row["mode"]): row for row in rows}
    modes = [m for m in ("ours", "eager", "incumbent") if any(row["mode"] == m for row in rows)]

    def cell(row: Row | None, fastest: float | None) -> str:
        if row is None or "ms" not in row:
            return "" if row is None else "fails"
        text = f"{row['ms']:.1f} ms"
        memory = f" / {row['peak_mb']:,.0f} MB" if "peak_mb" in row else ""
        mark = "†" if "compared" in row else ""
        return (f"**{text}**" if row["ms"] == fastest else text) + memory + mark

    body = []
    for loss, case in sorted({key[:2] for key in cells}):
        line = [cells.get((loss, case, mode)) for mode in modes]
        fastest = min((row["ms"] for row in line if row and "ms" in row), default=None)
        ours = cells.get((loss, case, "ours")) or {}
        rate = f"{ours['tflop_s']:.0f} TFLOP/s" if "tflop_s" in ours else ""
        body.append([f"{loss} {case}", *(cell(row, fastest) for row in line), rate])
    if not body:
        return "No results."
    table = markdown(["loss, B x T x H x V", *modes, "rate of ours"], body)
    marked = any("compared" in row for row in rows)
    note = ["† less exact than our rule allows, on a small shape."] if marked else []
    return "\n\n".join([table, *note, provenance(content, "chunked")])


def provenance(content: dict[str, Any], kind: str) -> str:
    """Where, when and with what: a line per commit and versions that the tables draw on."""
    used = {row["run"] for row in content[kind]}
    runs = [run for name, run in sorted(content["runs"].items()) if name in used]
    lines: dict[str, list[Row]] = {}
    for run in runs:
        line = (
            f"{run['gpu']}, driver {run['driver']}, torch {run['torch']}, triton {run['triton']}, "
            f"commit {run['commit'][:10]}"
        )
        lines.setdefault(line, []).append(run)
    return "\n".join(f"{line}, {_when(together)}." for line, together in lines.items())


def _when(runs: list[Row]) -> str:
    text = f"{' and '.join(sorted({run['date'][:10] for run in runs}))} UTC"
    for name, unit, key in (
        ("copy", "GB/s", "copy_gb_s"),
        ("matrix product", "TFLOP/s", "gemm_tflop_s"),
    ):
        found = sorted(round(run[key]) for run in runs if run.get(key))
        if found:
            text += f"; {name} {' to '.join(map(str, dict.fromkeys((found[0], found[-1]))))} {unit}"
    return text


def filled(text: str, content: dict[str, Any]) -> str:
    """`text` with the tables between its markers renewed."""

    def table(match: re.Match[str]) -> str:
        kind = match["kind"]
        whole = {
            "e2e": e2e_table,
            "head": head_table,
            "host": host_table,
            "chunked": chunked_table,
        }
        if kind in whole:
            made = whole[kind](content)
        else:
            made = ops_tables(content, None if kind == "ops" else kind)
        return f"<!-- benchmark:{kind} -->\n{made}\n<!-- /benchmark:{kind} -->"

    pattern = r"<!-- benchmark:(?P<kind>\w+) -->.*?<!-- /benchmark:(?P=kind) -->"
    return re.sub(pattern, table, text, flags=re.DOTALL)


def main(argv: list[str]) -> int:
    if not argv or not Path(argv[0]).exists():
        print(__doc__, file=sys.stderr)
        return 2
    content = load(Path(argv[0]))
    if len(argv) == 1:
        parts = ops_tables(content), e2e_table(content), chunked_table(content), host_table(content)
        print(*parts, sep="\n\n")
    for name in argv[1:]:
        path = Path(name)
        before = path.read_text()
        after = filled(before, content)
        if "<!-- benchmark:" not in before:
            print(f"{name} has no <!-- benchmark:... --> marker: nothing to fill", file=sys.stderr)
            return 1
        path.write_text(after)
        print(f"{name}: {'changed' if after != before else 'already up to date'}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
