"""Draw a file of results: one claim a picture, each as SVG for light and for dark pages.

    python -m benchmark plots benchmark/results/<gpu>.json          # into docs/plots/
    python -m benchmark plots benchmark/results/<gpu>.json FOLDER

A picture whose rows the file lacks is left out and named. Titles and captions are made of the measured numbers.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure

from benchmark import shapes, sources
from benchmark.options import Parser
from benchmark.results import Row, load
from benchmark.tables import LOSS_HEAD, STEP_NAMES, model_name

TARGET = sources.ROOT / "docs" / "plots"
OURS = "ours"
#: what a reader would pick instead, by provider and by mode; the order of bars
NAMES = {
    "eager": "PyTorch",
    "torch": "PyTorch",
    "cce": "cut cross entropy",
    "liger": "liger-kernel 0.8.5",
    "ours": OURS,
    **STEP_NAMES,
}
HEADS = ("torch", "cce", "liger", "ours")
WIDTH = 5.6  # inches; a page shows it 400 to 700 pixels wide
FONTS = "system-ui, -apple-system, 'Segoe UI', Helvetica, Arial, sans-serif"
STYLE = {"svg.fonttype": "none", "svg.hashsalt": "liger_kernel", "font.size": 9}


@dataclass(frozen=True)
class Theme:
    ground: str
    text: str
    other: str
    quiet: str
    colours: dict[str, str]

    def of(self, name: str) -> str:
        return self.colours.get(name, self.other)


THEMES = {
    "light": Theme(
        "#ffffff",
        "#1f2328",
        "#6e7781",
        "#d0d7de",
        {OURS: "#00796b", "liger-kernel 0.8.5": "#b35900", "cut cross entropy": "#6f42c1"},
    ),
    "dark": Theme(
        "#1e2129",
        "#e6edf3",
        "#9aa4b2",
        "#454b57",
        {OURS: "#4dd0b8", "liger-kernel 0.8.5": "#f0a35e", "cut cross entropy": "#b9a0f5"},
    ),
}


@dataclass(frozen=True)
class Bars:
    title: str
    caption: str
    unit: str
    values: dict[str, float]
    height = 2.2

    def draw(self, figure: Figure, theme: Theme) -> None:
        axes = figure.add_axes((0.26, 0.24, 0.56, 0.54))
        names = list(self.values)[::-1]
        for at, name in enumerate(names):
            value, ours = self.values[name], name == OURS
            colour = theme.colours[OURS] if ours else theme.other
            axes.barh(at, value, height=0.66, color=colour)
            style: dict[str, Any] = {"color": theme.text, "weight": "bold" if ours else "normal"}
            beside(axes, f"{value:,.0f}" if value >= 100 else f"{value:.1f}", (value, at), **style)
            beside(axes, name, (0, at), right=-4, ha="right", **style)
        figure.text(0.03, 0.82, self.unit, color=theme.other)
        axes.set_axis_off()


@dataclass(frozen=True)
class Lines:
    title: str
    caption: str
    unit: str
    series: dict[str, list[tuple[float, float]]]
    x: str
    ticks: tuple[float, ...]  # of the y axis
    log: bool
    height = 3.1

    def draw(self, figure: Figure, theme: Theme) -> None:
        axes = figure.add_axes((0.1, 0.3, 0.62, 0.49))
        for name, points in self.series.items():
            colour, width = theme.of(name), 2.4 if name == OURS else 1.4
            axes.plot(*zip(*points, strict=True), "o-", ms=width + 1, lw=width, color=colour)
        scale = "log" if self.log else "linear"
        axes.set(xscale=scale, yscale=scale)
        xs = sorted({x for points in self.series.values() for x, _ in points})
        axes.set_xticks(xs, [thousands(x) for x in xs])
        axes.set_yticks(self.ticks, [f"{y:,g}" for y in self.ticks])
        plain(axes, theme, "bottom")
        axes.grid(axis="y", color=theme.quiet, lw=0.6)
        axes.set_xlabel(self.x, color=theme.text)
        figure.text(0.03, 0.82, self.unit, color=theme.other)
        self._names(axes, theme, xs[-1])

    def _names(self, axes: Any, theme: Theme, last: float) -> None:
        """At the ends of the lines, 11 points apart at least."""
        free = -1e9
        height = self.height * 72 * axes.get_position().height
        for name, points in sorted(self.series.items(), key=lambda item: item[1][-1][1]):
            style: dict[str, Any] = {"color": theme.of(name)}
            if points[-1][0] < last:
                axes.plot(*points[-1], "x", ms=9, mew=2, **style)
                beside(axes, "out of memory", points[-1], right=3, up=8, fontsize=7.5, **style)
            _, y = axes.transAxes.inverted().transform(axes.transData.transform(points[-1]))
            free = max(y * height, free + 11)
            style |= {"va": "center", "weight": "bold" if name == OURS else "normal"}
            axes.text(1.02, free / height, name, transform=axes.transAxes, **style)


@dataclass(frozen=True)
class Roofline:
    title: str
    caption: str
    points: dict[str, tuple[float, float, float]]  # operations per byte, TFLOP/s, % of the ceiling
    copy: float  # TB/s
    gemm: float  # TFLOP/s
    unit = "TFLOP/s"
    height = 3.1

    def draw(self, figure: Figure, theme: Theme) -> None:
        axes = figure.add_axes((0.1, 0.27, 0.86, 0.52))
        left, knee, end = 0.02, self.gemm / self.copy, 60_000.0
        axes.plot([left, knee, end], [left * self.copy, self.gemm, self.gemm], color=theme.other)
        for name, (x, y, share) in self.points.items():
            axes.plot(x, y, "o", ms=7, color=theme.colours[OURS])
            right, up, side = ROOF_LABELS[name]
            text = f"{name} {share:.0f} %"
            beside(axes, text, (x, y), right, up, ha=side, color=theme.text, weight="bold")
        style: dict[str, Any] = {"color": theme.other, "ha": "right"}
        beside(axes, f"copy {self.copy:.2f} TB/s", (knee / 8, self.gemm / 8), right=-6, **style)
        beside(
            axes,
            f"bf16 matrix product {self.gemm:.0f} TFLOP/s",
            (end, self.gemm),
            right=0,
            up=8,
            **style,
        )
        axes.set(xscale="log", yscale="log", xlim=(left, end), ylim=(0.3, 2000))
        for set_ticks, numbers in (
            (axes.set_xticks, (1, 100, 10_000)),
            (axes.set_yticks, (1, 10, 100, 1000)),
        ):
            set_ticks(numbers, [f"{number:,}" for number in numbers])
        plain(axes, theme, "bottom", "left")
        axes.set_xlabel("operations per byte that must move", color=theme.text)
        figure.text(0.03, 0.82, self.unit, color=theme.other)


def beside(
    axes: Any, text: str, at: tuple[float, float], right: float = 4, up: float = 0, **style: Any
) -> None:
    """Text some points right of and above a place in the data."""
    style = {"va": "center", **style}
    axes.annotate(text, at, (right, up), textcoords="offset points", annotation_clip=False, **style)


def plain(axes: Any, theme: Theme, *sides: str) -> None:
    """No frame but on these sides, and no marks at the numbers."""
    axes.minorticks_off()
    axes.tick_params(colors=theme.text, length=0)
    for side, spine in axes.spines.items():
        spine.set_visible(side in sides)
        spine.set_color(theme.quiet)


Picture = Bars | Lines | Roofline


def thousands(number: float) -> str:
    return f"{number / (1000 if number % 1024 or not number % 1000 else 1024):.0f}k"


def place(content: dict[str, Any], rows: list[Row]) -> str:
    """The machine, the versions and the days of these rows."""
    runs = [content["runs"][name] for name in sorted({row["run"] for row in rows})]
    days = " and ".join(sorted({run["date"][:10] for run in runs}))
    return f"{content['gpu']}, bf16, torch {runs[0]['torch']}, {days}"


def step(content: dict[str, Any], shape: str, seq: int, batch: int, memory: bool = False) -> Bars:
    """Tokens per second, or the peak memory, of a training step."""
    found = {r["mode"]: r for r in content["e2e"]
             if (r["shape"], r["seq"], r["batch"], r["rank"]) == (shape, seq, batch, 0)}  # fmt: skip
    rows = [found[mode] for mode in STEP_NAMES]
    key = "peak_gb" if memory else "tokens_per_s"
    values = {NAMES[row["mode"]]: row[key] for row in rows}
    stock, ours = values[NAMES["stock"]], values[OURS]
    gain = (
        f"{ours:.0f} GB instead of {stock:.0f}"
        if memory
        else f"{ours / stock:.1f} times HuggingFace's speed"
    )
    title = f"{model_name(shape)}{'' if seq < 16384 else f', {thousands(seq)} tokens'}: {gain}"
    caption = (
        f"Training step (forward, backward, fused AdamW), {batch} x {seq} tokens, random weights.\n"
        f"{place(content, rows)}"
    )
    return Bars(title, caption, "peak GB" if memory else "tokens per second", values)


def heads(
    content: dict[str, Any], value: str, hidden: int, tokens: int | None = None, classes: int = 0
) -> tuple[dict[str, list[tuple[float, float]]], list[Row]]:
    """`value` of the fused loss by provider, against tokens, or, where these are given, against classes."""
    series: dict[str, list[tuple[float, float]]] = {}
    used = []
    for row in content["ops"]:
        if (row["op"], row["mode"]) != (LOSS_HEAD, "full") or row["provider"] not in HEADS:
            continue
        if not (size := re.fullmatch(r"(\d+)x(\d+)x(\d+)", row["case"])):
            continue
        n, h, v = map(int, size.groups())
        if h != hidden or (n != tokens if tokens else v != classes) or row.get(value) is None:
            continue
        if tokens and v % 8:  # another claim: a vocabulary of odd size
            continue
        used.append(row)
        series.setdefault(NAMES[row["provider"]], []).append((v if tokens else n, row[value]))
    ordered = {NAMES[p]: sorted(series[NAMES[p]]) for p in HEADS}
    return ordered, used


def head_caption(content: dict[str, Any], what: str, rows: list[Row]) -> str:
    return f"Output layer and cross entropy, forward + backward, {what}.\n{place(content, rows)}"


def against_tokens(content: dict[str, Any], value: str) -> Lines:
    series, rows = heads(content, value, 1024, classes=128256)
    caption = head_caption(content, "hidden size 1024, 128,256 classes", rows)
    if value == "ms":
        series = {name: [(x, 1e3 * y / x) for x, y in line] for name, line in series.items()}
        few, first = series[OURS][0]
        gain = series["liger-kernel 0.8.5"][0][1] / first
        title = f"{gain:.0f} times the speed of liger-kernel at {thousands(few)} tokens"
        return Lines(
            title, caption, "microseconds per token", series, "tokens", (1, 3, 10, 30), True
        )
    series = {name: [(x, y / 1e3) for x, y in line] for name, line in series.items()}
    most, peak = series[OURS][-1]
    title = f"{thousands(most)} tokens need {peak:.1f} GB; PyTorch runs out of 80 GB"
    return Lines(title, caption, "GB above the inputs", series, "tokens", (0.3, 1, 3, 10, 30), True)


def against_classes(content: dict[str, Any], value: str) -> Lines:
    series, rows = heads(content, value, 4096, tokens=8192)
    caption = head_caption(content, "8,192 tokens, hidden size 4096", rows)
    most = f"{thousands(series[OURS][-1][0])} classes"
    last = {name: line[-1][1] for name, line in series.items()}
    if value == "ms":
        best = min(value for name, value in last.items() if name != OURS)
        title = f"{most}: {last[OURS]:.0f} ms where the next best takes {best:.0f}"
        return Lines(title, caption, "milliseconds", series, "classes", (0, 50, 100), False)
    series = {name: [(x, y / 1e3) for x, y in line] for name, line in series.items()}
    title = f"{most}: {last[OURS] / 1e3:.1f} GB where PyTorch needs {last['PyTorch'] / 1e3:.1f}"
    return Lines(title, caption, "GB above the inputs", series, "classes", (0, 5, 10), False)


def loss(content: dict[str, Any], name: str) -> Bars:
    case = next(iter(shapes.LOSSES))
    of_case = (row for row in content["chunked"] if (row["loss"], row["case"]) == (name, case))
    found = {row["mode"]: row for row in of_case}
    rows = [found[mode] for mode in ("eager", "incumbent", "ours")]
    values = {NAMES[row["mode"]]: row["ms"] for row in rows}
    best = min(value for other, value in values.items() if other != OURS)
    b, t, h, v = map(int, rows[0]["case"].split("x"))
    caption = (
        f"From hidden states to gradients: {b} sequences of {t} tokens, hidden size {h}, {v:,} classes.\n"
        f"{place(content, rows)}"
    )
    title = f"{name.upper()}: {best / values[OURS]:.1f} times as fast as the next best"
    return Bars(title, caption, "milliseconds", values)


#: points right of and above the mark of an op, and the side of the text that is there
ROOF_LABELS = {
    "RoPE": (8, -6, "left"),
    "RMSNorm": (-8, 3, "right"),
    "cross entropy": (8, -3, "left"),
    "gated MLP": (-6, -9, "right"),
    "fused loss": (0, -22, "center"),
}
#: op and case -> name, bytes and operations of forward + backward: the least traffic; an exp, a root or a division
#: counts as one operation
ROOF: dict[tuple[str, str], tuple[str, Callable[..., float], Callable[..., float]]] = {
    ("rope", "llama-8b"): ("RoPE", lambda: 4 * 2, lambda: 6),
    ("rms_norm", "8192x4096"): ("RMSNorm", lambda: 5 * 2, lambda: 13),
    ("cross_entropy", "8192x128256-in-place"): ("cross entropy", lambda: 2 * 2, lambda: 9),
    ("gated_mlp", "8192x4096x14336"): (
        "gated MLP",
        lambda t, h, f: 2 * (4 * t * h + 9 * h * f),
        lambda t, h, f: 18 * t * h * f,
    ),
    (LOSS_HEAD, "8192x4096x128256"): (
        "fused loss",
        lambda t, h, v: 2 * (2 * t * h + 2 * v * h),
        lambda t, h, v: 6 * t * h * v,
    ),
}


def roofline(content: dict[str, Any]) -> Roofline:
    found = {(r["op"], r["case"]): r for r in content["ops"]
             if r["provider"] == "ours" and r["mode"] == "full"}  # fmt: skip
    rows = [found[key] for key in ROOF]
    runs = [content["runs"][row["run"]] for row in rows]
    points = {}
    for row, (name, traffic, operations) in zip(rows, ROOF.values(), strict=True):
        of_products = row["unit"] == "TFLOP/s"
        sizes = tuple(map(int, row["case"].split("x"))) if of_products else ()
        intensity = operations(*sizes) / traffic(*sizes)
        rate = row["rate"] if of_products else row["rate"] * intensity / 1e3
        points[name] = (intensity, rate, row["percent_of_ceiling"])
    worst = min(share for _, _, share in points.values())
    return Roofline(
        f"Near the roof: {worst:.0f} % or more of what the GPU can do",
        "Forward + backward, kernels alone; operations counted from the formulas, the roof measured.\n"
        + place(content, rows),
        points,
        copy=max(run["copy_gb_s"] for run in runs) / 1e3,
        gemm=max(run["gemm_tflop_s"] for run in runs),
    )


#: name of the file -> what it shows
PICTURES: dict[str, Callable[[dict[str, Any]], Picture]] = {
    "step-speed": lambda c: step(c, "llama-3.2-1b", 2048, 8),
    "step-memory": lambda c: step(c, "llama-3.2-1b", 2048, 8, memory=True),
    "step-speed-small": lambda c: step(c, "qwen3-0.6b", 2048, 8),
    "step-speed-long": lambda c: step(c, "llama-3.2-1b", 16384, 1),
    "head-time-tokens": lambda c: against_tokens(c, "ms"),
    "head-memory-tokens": lambda c: against_tokens(c, "peak_mb"),
    "head-time-classes": lambda c: against_classes(c, "ms"),
    "head-memory-classes": lambda c: against_classes(c, "peak_mb"),
    "grpo-time": lambda c: loss(c, "grpo"),
    "dpo-time": lambda c: loss(c, "dpo"),
    "roofline": roofline,
}


def svg(picture: Picture, kind: str) -> str:
    """The same text for the same picture and matplotlib, whatever day it is and whatever fonts there are."""
    theme = THEMES[kind]
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, picture.height), facecolor=theme.ground)
        figure.text(0.03, 1 - 0.22 / picture.height, picture.title, fontsize=11, weight="bold",
                    color=theme.text)  # fmt: skip
        figure.text(0.03, 0.03, picture.caption, fontsize=7.5, color=theme.other)
        picture.draw(figure, theme)
        for axes in figure.axes:
            axes.set_facecolor("none")
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Title": picture.title})
    return re.sub(r"'DejaVu Sans'[^;\"]*", FONTS, buffer.getvalue())


def main(argv: list[str] | None = None) -> int:
    parser = Parser("plots", __doc__)
    parser.add_argument("results", type=Path)
    parser.add_argument("target", nargs="?", type=Path, default=TARGET, metavar="FOLDER")
    args = parser.parse_args(argv)
    parser.exist([args.results])
    content = load(args.results)
    args.target.mkdir(parents=True, exist_ok=True)
    drawn = 0
    for name, make in PICTURES.items():
        try:
            picture = make(content)
        except KeyError as missing:
            print(f"{name}: left out, these results have no {missing}")
            continue
        for kind in THEMES:
            (args.target / f"{name}-{kind}.svg").write_text(svg(picture, kind), encoding="utf-8")
        drawn += 1
    print(f"{args.target}: {drawn} pictures, each light and dark")
    return 0 if drawn else 1
