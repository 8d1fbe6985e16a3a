"""Draw a file of results: `python benchmark/plots.py benchmark/results/nvidia-h200.json` writes the PNG beside it.

Left, how close each op comes to the ceiling of the device (full call, kernels alone where that is known); right, time
and memory of fused linear cross entropy.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
from results import Row, load
from tables import LOSS_HEAD, PROVIDER_ORDER

COLOURS = dict(zip(PROVIDER_ORDER, plt.get_cmap("tab10").colors, strict=False))


def full_calls(content: dict[str, Any]) -> list[Row]:
    """Not those of the sweep, which are too many."""
    return [row for row in content["ops"] if row["mode"] == "full" and "launches" in row]


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
        raise SystemExit("these results hold no full call: run benchmark/run.py first")
    head = [row for row in rows if row["op"] == LOSS_HEAD]
    groups = len({(row["op"], row["case"]) for row in rows})
    figure, axes = plt.subplots(1, 3, figsize=(17, max(4.0, 0.5 * groups)), layout="constrained")
    bars(
        axes[0],
        rows,
        "percent_of_ceiling",
        "share of the ceiling, forward + backward",
        "% (longer is better)",
    )
    axes[0].axvline(100, color="black", linewidth=0.8, linestyle="--")
    bars(axes[1], head, "ms", "fused linear cross entropy: time", "ms (shorter is better)")
    bars(
        axes[2],
        head,
        "peak_mb",
        "fused linear cross entropy: memory",
        "MB above the inputs (shorter is better)",
    )
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(
        handles, labels, loc="outside upper center", ncols=max(1, len(labels)), frameon=False
    )
    figure.supxlabel(f"{content['gpu']}, bf16", fontsize=8)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def main(argv: list[str]) -> int:
    if len(argv) not in (1, 2) or not Path(argv[0]).exists():
        print(__doc__, file=sys.stderr)
        return 2
    source = Path(argv[0])
    target = Path(argv[1]) if len(argv) == 2 else source.with_suffix(".png")
    draw(load(source), target)
    print(target)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
