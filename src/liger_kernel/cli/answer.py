"""What a command returns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any


class UserError(Exception):
    """What the user asked for cannot be done: one line on stderr, exit status 2."""


def said(error: BaseException) -> str:
    """What an error of somebody else says, in one line: its type where it says nothing, and no stack of PyTorch's."""
    text = str(error).partition("Exception raised from ")[0]
    return " ".join(text.split()) or type(error).__name__


@dataclass(frozen=True)
class Table:
    """`title` above, `columns` as its head (none: no head), cells that are text."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True)
class Answer:
    """`data` is what --json prints; `parts` say the same to people, in their order. `status` is that of the process."""

    data: Any
    parts: Sequence[Table | str] = field(default=())
    status: int = 0


def size(n_bytes: float) -> str:
    """`12.3 GiB`."""
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if abs(n_bytes) < 1024 or unit == "GiB":
            break
        n_bytes /= 1024
    return f"{n_bytes:.0f} {unit}" if unit == "bytes" else f"{n_bytes:,.2f} {unit}"
