"""Prints answers and progress: by rich where that is installed, else as plain text of the terminal's width."""

from __future__ import annotations

import itertools
import json
import shutil
import sys
import textwrap
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, TypeVar

from liger_kernel.cli.answer import Answer, Table

_T = TypeVar("_T")


def present(answer: Answer, as_json: bool = False) -> None:
    if as_json:
        print(json.dumps(answer.data, indent=2))
        return
    draw = _rich() or _plain
    tables = [isinstance(part, Table) for part in answer.parts]
    for i, part in enumerate(answer.parts):
        if i and any(tables[i - 1 : i + 1]):
            print()
        draw(part)


def _rich() -> Any:
    try:
        from rich import box, console, markup, table, text
    except ImportError:
        return None
    out = console.Console(highlight=False)

    def draw(part: Table | str) -> None:
        if isinstance(part, str):
            out.print(part, markup=False)
            return
        drawn = table.Table(
            show_header=bool(part.columns), show_edge=False, pad_edge=False, box=box.SIMPLE_HEAD
        )
        widths = _widths(part, out.width, gap=3)
        for name, width in zip(part.columns or [""] * len(widths), widths, strict=True):
            drawn.add_column(name, overflow="fold", width=width)
        for row in part.rows:
            drawn.add_row(
                *(markup.escape(_folded(*cell)) for cell in zip(row, widths, strict=True))
            )
        out.print(text.Text(part.title, "bold"), drawn, sep="\n")

    return draw


def _plain(part: Table | str) -> None:
    width = shutil.get_terminal_size((80, 24)).columns
    if isinstance(part, str):
        for line in part.splitlines():
            print(textwrap.fill(line, width) if line else "")
        return
    print("\n".join([textwrap.fill(part.title, width), *_lines(part, width)]))


def _all_rows(part: Table) -> list[Sequence[str]]:
    return [*([part.columns] if part.columns else []), *part.rows]


def _widths(part: Table, width: int, gap: int) -> list[int]:
    """Of columns that fit into `width`. The last one, most often prose, gives way first: paths and names stay whole."""
    widths = [max(map(len, column), default=0) for column in zip(*_all_rows(part), strict=True)]
    while sum(widths) + gap * (len(widths) - 1) > width and max(widths) > 8:
        widest = -1 if widths[-1] > 19 else widths.index(max(widths))
        widths[widest] -= 1
    return widths


def _folded(cell: str, width: int) -> str:
    """Lines of at most `width`; a word that is longer goes on behind a dot or an underscore of it, where it can."""
    lines: list[str] = []
    for line in textwrap.wrap(cell, width, break_long_words=False) if width else []:
        while len(line) > width:
            cut = 1 + max(line.rfind(mark, 0, width) for mark in "._") or width
            lines.append(line[:cut])
            line = line[cut:]
        lines.append(line)
    return "\n".join(lines)


def _lines(part: Table, width: int) -> Iterator[str]:
    """Lines of at most `width`; the cells of columns that are too wide go on below."""
    widths = _widths(part, width, gap=2)
    for row in _all_rows(part):
        cells = [_folded(*cell).split("\n") for cell in zip(row, widths, strict=True)]
        for line in itertools.zip_longest(*cells, fillvalue=""):
            yield "  ".join(map(str.ljust, line, widths)).rstrip()


def track(items: Iterable[_T], what: str, total: int) -> Iterator[_T]:
    """`items`, while a bar on stderr shows how far they are; ten lines in all where stderr is no terminal.

    There are `total` of them.
    """
    if not sys.stderr.isatty():
        for i, item in enumerate(items, 1):
            yield item
            if total >= 100 and i * 10 % total < 10:
                print(f"{what}: {i} of {total}", file=sys.stderr, flush=True)
        return
    try:
        from rich.console import Console
        from rich.progress import track as bar
    except ImportError:
        for i, item in enumerate(items, 1):
            print(f"\r{what}: {i} of {total}", end="", file=sys.stderr, flush=True)
            yield item
        print(file=sys.stderr)
    else:
        yield from bar(items, what, total, console=Console(stderr=True), transient=True)
