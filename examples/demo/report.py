"""What the two runs gave: losses side by side, a Markdown table, a plot."""

from __future__ import annotations

import math
import statistics
from pathlib import Path
from typing import Any

import torch

Results = dict[str, dict[str, Any]]
COLOURS = {"stock": "#9aa0a6", "patched": "#1a73e8"}
LAST = 5  # steps over which accuracies are averaged
CURVES = {"losses": "loss", "accuracies": "accuracy"}


def relative_differences(results: Results) -> list[float]:
    """|patched - stock| / |stock| of every step's loss; empty unless both ran."""
    if len(results) < 2:
        return []
    stock, patched = results["stock"]["losses"], results["patched"]["losses"]
    return [
        abs(b - a) / abs(a) if a else (math.inf if b else 0.0)
        for a, b in zip(stock, patched, strict=True)
    ]


def speedups(results: Results) -> list[float]:
    """How much faster `patched` was than `stock` in each turn; empty unless both ran."""
    if len(results) < 2:
        return []
    stock, patched = results["stock"]["turns"], results["patched"]["turns"]
    return [a / b for a, b in zip(stock, patched, strict=True)]


def undecided(results: Results) -> bool:
    found = speedups(results)
    return bool(found) and min(found) < 1 < max(found)


def losses_agree(results: Results, dtype: str) -> bool:
    """False where rounding cannot explain the difference: more than half of the digits of `dtype` are lost.

    A step begins from the rounding differences of all steps before it, so they grow; hence not a few units in the
    last place. How close single outputs and gradients must be is what the test suite says.
    """
    differences = relative_differences(results)
    bound = math.sqrt(torch.finfo(getattr(torch, dtype)).eps)
    return all(math.isfinite(d) and d <= bound for d in differences)


def loss_table(results: Results) -> str:
    modes = list(results)
    differences = relative_differences(results)
    lines = ["step  " + "".join(f"{mode + ' loss':>16}" for mode in modes)]
    if differences:
        lines[0] += f"{'rel. difference':>18}"
    for step, losses in enumerate(zip(*(results[m]["losses"] for m in modes), strict=True)):
        line = f"{step + 1:>4}  " + "".join(f"{loss:>16.9f}" for loss in losses)
        lines.append(line + (f"{differences[step]:>18.1e}" if differences else ""))
    return "\n".join(lines)


def _rows(results: Results) -> list[tuple[str, list[float], str]]:
    """(label, one value per mode, format) of the summary."""
    values = results.values()
    accuracies = []
    if all("accuracies" in r for r in values):
        for which, steps in (("first", slice(LAST)), ("last", slice(-LAST, None))):
            means = [statistics.fmean(r["accuracies"][steps]) for r in values]
            accuracies.append((f"accuracy, mean of the {which} {LAST} steps", means, "{:.0%}"))
    return [
        ("tokens/s", [r["tokens_per_second"] for r in values], "{:,.0f}"),
        ("time per step", [r["seconds_per_step"] for r in values], "{:.3f} s"),
        (
            "peak memory above the model at rest",
            [(r["memory_peak"] - r["memory_at_rest"]) / 1e9 for r in values],
            "{:.2f} GB",
        ),
        ("peak memory", [r["memory_peak"] / 1e9 for r in values], "{:.2f} GB"),
        ("loss of the last step", [r["losses"][-1] for r in values], "{:.6f}"),
        *accuracies,
    ]


def markdown(title: str, results: Results, same_batches: bool = True) -> str:
    """The summary, ready to be pasted into a README; losses are compared where both runs saw the same batches."""
    both = len(results) == 2
    head = [title, *results, *(["patched / stock"] if both else [])]
    lines = ["| " + " | ".join(head) + " |", "|---" + "|--:" * (len(head) - 1) + "|"]
    for label, values, form in _rows(results):
        cells = [label, *(form.format(v) for v in values)]
        if both:
            cells.append(f"{values[1] / values[0]:.2f}x" if values[0] else "")
        if both and label.startswith(("accuracy", "loss")):
            cells[-1] = ""
        if both and label.startswith("loss") and same_batches:
            worst = max(relative_differences(results))
            cells[-1] = f"max. rel. difference {worst:.1e}"
        lines.append("| " + " | ".join(cells) + " |")
    if both:
        found = speedups(results)
        spread = " / ".join(f"{f(found):.2f}x" for f in (min, statistics.median, max))
        label = f"speed, min / median / max of {len(found)} turns"
        lines.insert(4, f"| {label} | | | {spread} |")
    return "\n".join(lines)


def plot(title: str, results: Results, file: Path) -> None:
    """Curves of the loss, and of the accuracy where there is one, over each other, and bars for time and memory."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    drawn = [name for name in CURVES if all(name in result for result in results.values())]
    widths = (*(2.2 for _ in drawn), 1, 1)
    size = (3.1 * sum(widths), 4.2)
    figure, axes = plt.subplots(
        1, len(widths), figsize=size, width_ratios=widths, layout="constrained"
    )
    figure.suptitle(title, fontsize=11)
    for curves, name in zip(axes, drawn, strict=False):
        for mode, result in results.items():
            steps = range(1, len(result[name]) + 1)
            style: dict[str, Any] = (
                {"linewidth": 5, "alpha": 0.6} if mode == "stock" else {"marker": "o"}
            )
            curves.plot(steps, result[name], color=COLOURS[mode], label=mode, **style)
        curves.set(xlabel="step", ylabel=CURVES[name], title=CURVES[name])
        curves.legend()
        curves.grid(alpha=0.3)
    rows = _rows(results)
    for bars, (label, values, form) in zip(axes[len(drawn) :], rows[1:3], strict=True):
        heights = bars.bar(list(results), values, color=[COLOURS[mode] for mode in results])
        bars.bar_label(heights, labels=[form.format(v) for v in values])
        bars.set_title(label.replace(" above", "\nabove"), fontsize=10)
        bars.margins(y=0.15)
    figure.savefig(file, dpi=130)
    plt.close(figure)
