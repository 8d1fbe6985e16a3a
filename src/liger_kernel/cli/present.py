"""Prints answers and progress: by rich where that is installed, else as plain text of the terminal's width."""

from __future__ import annotations

import json
import shutil
import sys
import textwrap
from collections.abc import Iterator, Sequence
from typing import Any, TypeVar

from liger_kernel.cli.answer import Answer, Table

_T = TypeVar("_T")


def present(answer: Answer, as_json: bool = False) -> None:
    if as_json:
        print(json.dumps(answer.data, indent=2))
        return
    draw = _rich() or _plain
    for part in answer.parts:
        draw(part)


def _rich() -> Any:
    try:
        from rich import box, console, markup, table
    except ImportError:
        return None
    out = console.Console(highlight=False)

    def draw(part: Table | str) -> None:
        if isinstance(part, str):
            out.print(part, markup=False)
            return
        drawn = table.Table(
            title=markup.escape(part.title),
            title_justify="left",
            show_header=bool(part.columns),
            box=box.SIMPLE_HEAD,
        )
        for name in part.columns or [""] * max(map(len, part.rows), default=0):
            drawn.add_column(name, overflow="fold")
        for row in part.rows:
            drawn.add_row(*map(markup.escape, row))
        out.print(drawn)

    return draw


def _plain(part: Table | str) -> None:
    width = shutil.get_terminal_size((80, 24)).columns
    if isinstance(part, str):
        for line in part.splitlines():
            print(textwrap.fill(line, width) if line else "")
        return
    rows = [*([part.columns] if part.columns else []), *part.rows]
    print("\n" + "\n".join([textwrap.fill(part.title, width), *_columns(rows, width)]) + "\n")


def _columns(rows: Sequence[Sequence[str]], width: int) -> Iterator[str]:
    """Lines of at most `width`; the cells of columns that are too wide go on below."""
    if not rows:
        return
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    while sum(widths) + 2 * len(widths) > width and max(widths) > 8:
        widths[widths.index(max(widths))] -= 1
    for row in rows:
        cells = [textwrap.wrap(cell, w or 1) or [""] for cell, w in zip(row, widths, strict=True)]
        for i in range(max(map(len, cells))):
            line = (c[i] if i < len(c) else "" for c in cells)
            yield "  ".join(map(str.ljust, line, widths)).rstrip()


def track(items: Sequence[_T], what: str) -> Iterator[_T]:
    """`items`, while a bar on stderr shows how far they are; ten lines in all where stderr is no terminal."""
    if not sys.stderr.isatty():
        for i, item in enumerate(items, 1):
            yield item
            if len(items) >= 100 and i * 10 % len(items) < 10:
                print(f"{what}: {i} of {len(items)}", file=sys.stderr, flush=True)
        return
    try:
        from rich.console import Console
        from rich.progress import track as bar
    except ImportError:
        for i, item in enumerate(items, 1):
            print(f"\r{what}: {i} of {len(items)}", end="", file=sys.stderr, flush=True)
            yield item
        print(file=sys.stderr)
    else:
        yield from bar(items, what, console=Console(stderr=True), transient=True)
