"""Draw a file of results: `python -m benchmark plots benchmark/results/<gpu>.json` writes two PNGs beside it.

<gpu>.png: left, how close each op comes to the ceiling of the device (full call, kernels alone where that is known);
right, time and memory of fused linear cross entropy. <gpu>-sweep.png: the same against tokens and vocabulary.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt

from benchmark.options import Parser
from benchmark.results import Row, load
from benchmark.tables import LOSS_HEAD, PROVIDER_ORDER

COLOURS = dict(zip(PROVIDER_ORDER, plt.get_cmap("tab10").colors, strict=False))


def full_calls(content: dict[str, Any]) -> list[Row]:
    """Not those of the sweep, which are too many."""
    return [row for row in content["ops"] if row["mode"] == "full" and "allocations" in row]


def bars(axes: Any, rows: list[Row], value: str, title: str, unit: str) -> None:
    """Grouped horizontal bars: a group per case, a bar per provider."""
    rows = [row for row in rows if value in row]
    groups = sorted({(row["op"], row["case"]) for row in rows}, reverse=True)
    providers = [p for p in PROVIDER_ORDER if any(row["provider"] == p for row in rows)]
    height = 0.8 / max(1, len(providers))
    for i, provider in enumerate(providers):
        mine = {(row["op"], row["case"]): row[value] for row in rows if row["provider"] == provider}
        at = [y + 0.4 - (i + 0.5) * height for y, group in enumerate(groups) if group in mine]
        values = [mine[group] for group in groups if group in mine]
        axes.barh(at, values, height=height, color=COLOURS[provider], label=provider)
    single = len({op for op, _ in groups}) == 1
    axes.set_yticks(
        range(len(groups)), [case if single else f"{op}\n{case}" for op, case in groups], fontsize=7
    )
    axes.set_xlabel(unit)
    axes.set_title(title, fontsize=10)
    axes.grid(axis="x", alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)


def draw(content: dict[str, Any], path: Path) -> None:
    rows = full_calls(content)
    if not rows:
        raise SystemExit("these results hold no full call: `python -m benchmark run` first")
    head = [row for row in rows if row["op"] == LOSS_HEAD]
    groups = len({(row["op"], row["case"]) for row in rows})
    figure, axes = plt.subplots(1, 3, figsize=(17, max(4.0, 0.5 * groups)), layout="constrained")
    title = "share of the ceiling, forward + backward"
    bars(axes[0], rows, "percent_of_ceiling", title, "% (longer is better)")
    axes[0].axvline(100, color="black", linewidth=0.8, linestyle="--")
    for axis, value, what, unit in (
        (axes[1], "ms", "time", "ms"),
        (axes[2], "peak_mb", "memory", "MB above the inputs"),
    ):
        title = f"fused linear cross entropy: {what}"
        bars(axis, head, value, title, f"{unit} (shorter is better)")
    handles, labels = axes[0].get_legend_handles_labels()
    columns = max(1, len(labels))
    figure.legend(handles, labels, loc="outside upper center", ncols=columns, frameon=False)
    figure.supxlabel(f"{content['gpu']}, bf16", fontsize=8)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def curves(axes: Any, rows: list[Row], hidden: int, value: str, per_token: float) -> None:
    """`value` per token against tokens, a line per provider and vocabulary: colours and widths."""
    sizes = [(tuple(map(int, row["case"].split("-")[0].split("x"))), row) for row in rows]
    sizes = [(size, row) for size, row in sizes if size[1] == hidden and row.get(value) is not None]
    vocabularies = sorted({classes for (_, _, classes), _ in sizes})
    for provider in [p for p in PROVIDER_ORDER if any(row["provider"] == p for _, row in sizes)]:
        for width, classes in enumerate(vocabularies, 1):
            points = sorted(
                (n, per_token * row[value] / n)
                for (n, _, c), row in sizes
                if c == classes and row["provider"] == provider
            )
            if points:
                label = f"{provider}, {classes // 1000}k classes"
                colour = COLOURS[provider]
                axes.plot(*zip(*points, strict=True), "o-", lw=width, color=colour, label=label)
    axes.set(xscale="log", yscale="log", xlabel=f"tokens (hidden size {hidden})")
    axes.set_xticks(
        ticks := sorted({n for (n, _, _), _ in sizes}), [f"{n // 1024}k" for n in ticks]
    )
    axes.minorticks_off()
    axes.grid(alpha=0.3)


def draw_sweep(content: dict[str, Any], path: Path) -> bool:
    """Whether there was something to draw."""
    rows = [row for row in content["ops"] if row["op"] == LOSS_HEAD and row["mode"] == "full"]
    rows = [row for row in rows if "allocations" not in row]
    if not rows:
        return False
    figure, axes = plt.subplots(2, 2, figsize=(13, 10), layout="constrained")
    for column, hidden in enumerate((1024, 8192)):
        curves(axes[0][column], rows, hidden, "ms", 1e3)
        curves(axes[1][column], rows, hidden, "peak_mb", 1e3)
        axes[0][column].set_ylabel("microseconds per token (lower is better)")
        axes[1][column].set_ylabel("kB per token above the inputs (lower is better)")
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False, fontsize=8)
    figure.suptitle(f"fused linear cross entropy, {content['gpu']}, bf16", fontsize=10)
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return True


def main(argv: list[str] | None = None) -> int:
    parser = Parser("plots", __doc__)
    parser.add_argument("results", type=Path)
    parser.add_argument("target", nargs="?", type=Path, help="default: beside the results")
    args = parser.parse_args(argv)
    parser.exist([args.results])
    content, target = load(args.results), args.target or args.results.with_suffix(".png")
    draw(content, target)
    print(target)
    sweep = target.with_name(target.stem + "-sweep.png")
    if draw_sweep(content, sweep):
        print(sweep)
    return 0
