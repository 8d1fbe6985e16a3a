"""Turn a file of results into Markdown tables.

    python -m benchmark tables benchmark/results/nvidia-h100-80gb-hbm3.json  # print them
    python -m benchmark tables benchmark/results/nvidia-h100-80gb-hbm3.json README.md  # and renew them in these files

A file takes the tables between `<!-- benchmark:KIND -->` and `<!-- /benchmark:KIND -->`; KIND is `ops`, `e2e`, `host`,
`steps` (`e2e` in short), `chunked`, `cpu` (ops on a processor), `head` (time and memory of the fused loss, without the
sweep) or the name of an op.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmark.options import Parser
from benchmark.results import KEYS, Row, load

PROVIDER_ORDER = (
    "ours",
    "base",
    "eager",
    "torch",
    "compile",
    "transformers",
    "liger",
    "cce",
    "quack",
)
LOSS_HEAD = "fused_linear_cross_entropy"
MODE_ORDER = ("fwd", "bwd", "full")
E2E_ORDER = (
    *("stock", "patched", "patched+graphs", "no-residual", "tiled-mlp"),
    *("incumbent", "compile", "patched+compile"),
)
STEP_NAMES = {
    "stock": "HuggingFace",
    "compile": "torch.compile",
    "incumbent": "liger-kernel 0.8.5",
    "patched": "ours",
}
GRAPHS = "patched+graphs"
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


def present(rows: list[Row], column: str, order: Iterable[str]) -> list[str]:
    return [name for name in order if any(row[column] == name for row in rows)]


def lines(
    rows: list[Row], key: Sequence[str], column: str, order: Sequence[str]
) -> Iterator[tuple[tuple[Any, ...], list[Row | None]]]:
    """Each key with its rows, one per name in `order`."""
    cells = {(tuple(row[name] for name in key), row[column]): row for row in rows}
    for values in sorted({values for values, _ in cells}, key=str):
        yield values, [cells.get((values, name)) for name in order]


def best(line: list[Row | None], name: str = "ms", choose: Any = min) -> float | None:
    return choose((row[name] for row in line if row and row.get(name) is not None), default=None)


def op_table(rows: list[Row]) -> str:
    """One op: a line per case and mode, a column per provider."""
    providers, body = present(rows, "provider", PROVIDER_ORDER), []
    found = lines(rows, ("case", "dtype", "mode"), "provider", providers)
    for key, line in sorted(found, key=lambda x: (*x[0][:2], MODE_ORDER.index(x[0][2]))):
        if best(line) is None and best(line, "gpu_ms") is None:
            continue
        ours = next((row for row in line if row and row["provider"] == "ours"), {})
        reached = ""
        if "rate" in ours:
            reached = f"{ours['rate']:.0f} {ours['unit']}, {ours['percent_of_ceiling']:.0f} %"
        memory = [f"{row['peak_mb']:.0f}" if row and "peak_mb" in row else "-" for row in line]
        name = key[0] if key[1] == "bfloat16" else f"{key[0]} {key[1]}"
        times = [time_cell(row, best(line)) for row in line]
        body.append([name, key[2], *times, reached, "/".join(memory)])
    header = ["case", "", *providers, "rate of ours", "peak MB, " + "/".join(providers)]
    return markdown(header, body)


def ops_tables(content: dict[str, Any], only: str | None = None) -> str:
    names = [name for name in sorted({row["op"] for row in content["ops"]}) if only in (None, name)]
    parts = [
        f"**{name}**\n\n{op_table([r for r in content['ops'] if r['op'] == name])}"
        for name in names
    ]
    return "\n\n".join([*parts, LEGEND, provenance(content, "ops")]) if parts else "No results."


def whole(
    content: dict[str, Any], kind: str, header: list[str], body: list[Any], *notes: str
) -> str:
    if not body:
        return "No results."
    return "\n\n".join([markdown(header, body), *notes, provenance(content, kind)])


def head_table(content: dict[str, Any]) -> str:
    """Forward and backward of the fused loss: milliseconds / MB above the inputs."""
    rows = [r for r in content["ops"] if (r["op"], r["mode"]) == (LOSS_HEAD, "full")]
    cases = {r["case"] for r in rows if r["provider"] == "ours" and "allocations" in r}
    order = ["ours", *present(rows, "provider", PROVIDER_ORDER[2:])]

    def cell(row: Row | None, fastest: float | None) -> str:
        if row is None or row.get("ms") is None:
            return (
                "" if row is None else "out of memory" if "OutOfMemory" in row["error"] else "fails"
            )
        text = f"{row['ms']:.3g} ms / {row['peak_mb']:,.0f} MB"
        return f"**{text}**" if row["ms"] == fastest else text

    return markdown(
        ["tokens x hidden x vocabulary", *order],
        (
            [case, *(cell(row, best(line)) for row in line)]
            for (case,), line in lines(rows, ("case",), "provider", order)
            if case in cases
        ),
    )


def e2e_table(content: dict[str, Any]) -> str:
    modes, body = present(content["e2e"], "mode", E2E_ORDER), []
    for key, line in lines(content["e2e"], KEYS["e2e"][:-1], "mode", modes):
        shape, seq, batch, checkpointing, *adapters, ignored = key
        told: list[Row | None] = [r for r in line if r and r.get("loss") is not None]
        speed, steps = best(line, "tokens_per_s", max) or 0, best(told, "steps", max) or 0
        name = f"{shape}, S{seq} B{batch}" + (", checkpointing" if checkpointing else "")
        name += adapted(*adapters)
        name += f", {ignored:.0%} of the labels ignored" if ignored else ""
        body.append([name, *(e2e_cell(row, speed, int(steps)) for row in line)])
    note = "Tokens per second, peak memory, loss of the last step (same data, same seed)."
    return whole(content, "e2e", ["model", *modes], body, note)


def adapted(rank: int, head: bool, weights: str) -> str:
    """What LoRA is on, for the name of a row."""
    if not rank:
        return ""
    return (
        f", LoRA r {rank}"
        + (" and on the head" if head else "")
        + (f" on {weights}" * bool(weights))
    )


def e2e_cell(row: Row | None, best: float, steps: int) -> str:
    """A loss after fewer than `steps` steps is another loss, and says so; without one there are speed and memory."""
    if row is None or "tokens_per_s" not in row:
        return "" if row is None else "fails"
    speed = f"{row['tokens_per_s']:,.0f}"
    speed = f"**{speed}**" if row["tokens_per_s"] == best else speed
    memory = "" if row["peak_gb"] is None else f" / {row['peak_gb']:.1f} GB"
    if row["loss"] is None:
        return speed + memory
    after = f" (step {row['steps']})" if row.get("steps", steps) != steps else ""
    return f"{speed}{memory} / {row['loss']:.4f}{after}"


def steps_table(content: dict[str, Any]) -> str:
    """The same for a reader in a hurry: ours beside what there would be instead, under the names that people use."""
    body = []
    rows = [r for r in content["e2e"] if r["mode"] in (*STEP_NAMES, GRAPHS)]
    content = {**content, "e2e": rows}
    for key, line in lines(rows, KEYS["e2e"][:-1], "mode", (*STEP_NAMES, GRAPHS)):
        shape, seq, batch, checkpointing, *adapters, ignored = key
        if ignored or sum(row is not None for row in line) < 2:
            continue
        name = f"{model_name(shape)}{adapted(*adapters)}, {batch} x {seq:,} tokens"
        name += ", checkpointing" if checkpointing else ""
        speed = best(line, "tokens_per_s", max) or 0
        *cells, graphs = (e2e_cell(row and {**row, "loss": None}, speed, 0) for row in line)
        cells[-1] += f"; {graphs.partition(' / ')[0]} with `cuda_graphs=True`" if graphs else ""
        body.append([name, *cells])
    return whole(content, "e2e", ["tokens/s / peak memory", *STEP_NAMES.values()], body)


def model_name(shape: str) -> str:
    """llama-3-8b-4-layers -> Llama-3-8B, 4 layers"""
    name = (
        re.sub(r"-(\d)-layers", r", \1 layers", shape)
        .replace("llama", "Llama")
        .replace("qwen", "Qwen")
        .replace("mixtral", "Mixtral")
    )
    return re.sub(r"a?\d+b\b", lambda size: size[0].upper(), name)


def host_table(content: dict[str, Any]) -> str:
    """Microseconds that Python is busy, forward / backward."""
    order = ("ours", "kernels", "one thread", "eager")
    body = [
        [*key, *(f"{row['fwd_us']:.0f} / {row['bwd_us']:.0f}" if row else "" for row in line)]
        for key, line in lines(content["host"], ("op", "case"), "provider", order)
    ]
    return whole(content, "host", ["op", "case", *order], body)


def chunked_table(content: dict[str, Any]) -> str:
    """Forward and backward of the losses on log-probabilities."""
    rows = content["chunked"]
    modes, body = present(rows, "mode", ("ours", "eager", "incumbent", "trl")), []

    def cell(row: Row | None, fastest: float | None) -> str:
        if row is None or "ms" not in row:
            return "" if row is None else "fails"
        text = f"{row['ms']:.1f} ms"
        memory = f" / {row['peak_mb']:,.0f} MB" if "peak_mb" in row else ""
        mark = "†" if "compared" in row else ""
        return (f"**{text}**" if row["ms"] == fastest else text) + memory + mark

    for (loss, case), line in lines(rows, ("loss", "case"), "mode", modes):
        rates = [
            f"{r['tflop_s']:.0f} TFLOP/s"
            for r in line
            if r and r["mode"] == "ours" and "tflop_s" in r
        ]
        body.append([f"{loss} {case}", *(cell(row, best(line)) for row in line), *(rates or [""])])
    marked = any("compared" in row for row in rows)
    note = ["† less exact than our rule allows, on a small shape."] if marked else []
    header = ["loss, B x T x H x V", *modes, "rate of ours"]
    return whole(content, "chunked", header, body, *note)


def cpu_table(content: dict[str, Any]) -> str:
    """Milliseconds of ops on a processor, in float32 and in bfloat16."""
    order = ("ours", "inductor", "eager", "torch")
    cells: dict[tuple[Any, ...], list[str]] = {}
    for (op, case, _), line in lines(content["ops"], ("op", "case", "dtype"), "provider", order):
        found = (time_cell(row, best(line)) for row in line)
        cells[op, case] = [*found, *cells.get((op, case), [])]
    body = [[*key, *line] for key, line in cells.items()]
    header = ["op", "size", *order, *(f"{name}, bf16" for name in order)]
    return whole(content, "ops", header, body)


#: what a page may ask for, beside `ops` and the ops themselves
KINDS = {
    "e2e": e2e_table,
    "steps": steps_table,
    "head": head_table,
    "host": host_table,
    "chunked": chunked_table,
    "cpu": cpu_table,
}


def provenance(content: dict[str, Any], kind: str) -> str:
    """Where, when and with what: a line per commit and versions that the tables draw on."""
    used = {row["run"] for row in content[kind]}
    runs = [run for name, run in sorted(content["runs"].items()) if name in used]
    lines: dict[str, list[Row]] = {}
    for run in runs:
        where = f"{run['gpu']}, driver {run['driver']}"
        if "processor" in run:
            where = f"{run['processor']}, {run['threads']} thread(s)"
        line = f"{where}, torch {run['torch']}, triton {run['triton']}, commit {run['commit'][:10]}"
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
        if kind in KINDS:
            made = KINDS[kind](content)
        else:
            made = ops_tables(content, None if kind == "ops" else kind)
        return f"<!-- benchmark:{kind} -->\n{made}\n<!-- /benchmark:{kind} -->"

    pattern = r"<!-- benchmark:(?P<kind>\w+) -->.*?<!-- /benchmark:(?P=kind) -->"
    return re.sub(pattern, table, text, flags=re.DOTALL)


def main(argv: list[str] | None = None) -> int:
    parser = Parser("tables", __doc__)
    parser.add_argument("results", type=Path)
    parser.add_argument("pages", nargs="*", type=Path, metavar="PAGE")
    args = parser.parse_args(argv)
    parser.exist([args.results, *args.pages])
    content = load(args.results)
    if not args.pages:
        parts = ops_tables(content), e2e_table(content), chunked_table(content), host_table(content)
        print(*parts, sep="\n\n")
    for page in args.pages:
        before = page.read_text()
        if "<!-- benchmark:" not in before:
            parser.error(f"{page} has no <!-- benchmark:... --> marker: nothing to fill")
        after = filled(before, content)
        page.write_text(after)
        print(f"{page}: {'changed' if after != before else 'already up to date'}")
    return 0
