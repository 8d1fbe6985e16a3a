"""What `patch` did, and what it left alone and why."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from liger_kernel.backends import computed_by

COLUMNS = ("kind", "modules", "", "replaced by")


@dataclass(frozen=True)
class Row:
    """One place in the model. `by` names the replacement, or is None where `reason` says why there is none."""

    kind: str  # that of a site: "loss", "norm", "mlp", "experts", "rope", "lora", ...
    path: str
    by: str | None = None
    reason: str = ""


@dataclass
class PatchReport:
    """The result of `liger_kernel.patch`: `rows`, and of these `replaced` and `skipped`, as the model is when read.

    A table when printed, by `rich` too; equal layers share a line.
    """

    model: str
    rows: list[Row] = field(default_factory=list)
    of: nn.Module | None = field(default=None, repr=False, compare=False)  # the patched model
    #: what `savings` of (model, tokens) come from, if anything does: a function of a module, so that it can be pickled
    forecast: Callable[[nn.Module, int], int] | None = field(
        default=None, init=False, repr=False, compare=False
    )

    #: why rows that may become untrue are, or None, by their kind and path: functions that can be pickled
    checks: dict[tuple[str, str], Callable[[], str | None]] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    #: likewise, what replaces them now
    names: dict[tuple[str, str], Callable[[], str]] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    @property
    def replaced(self) -> list[Row]:
        return [row for row in self.rows if row.by is not None]

    @property
    def skipped(self) -> list[Row]:
        return [row for row in self.rows if row.by is None]

    def add(
        self,
        kind: str,
        path: str,
        by: str | Callable[[], str] | None = None,
        reason: str = "",
        check: Callable[[], str | None] | None = None,
    ) -> None:
        """One more row; `check` says later why it is not true, if it is not; `by` may be a function, asked likewise."""
        if callable(by):
            self.names[kind, path] = by
            by = by()
        self._told.append(Row(kind, path, by, reason))
        if check is not None:
            self.checks[kind, path] = check

    def _now(self, row: Row) -> Row:
        check = self.checks.get((row.kind, row.path))
        reason = check() if check is not None else None
        if reason is not None:
            return Row(row.kind, row.path, reason=reason)
        name = self.names.get((row.kind, row.path))
        return row if name is None else Row(row.kind, row.path, by=name())

    def _current(self) -> list[Row]:
        return [self._now(row) for row in self._told]

    def _tell(self, rows: list[Row]) -> None:
        self._told = rows

    def savings(self, batch: int, seq: int) -> int:
        """Bytes that the fused loss takes off the peak memory of a training step on `batch` x `seq` tokens on a GPU.

        It is the difference of what the head and the loss hold at their worst moments (the formula: `savings.py`), and
        the difference of the whole step's peaks where those moments are the peaks, as with large vocabularies and
        checkpointed activations. Where the backward of the layers is the higher peak, the step saves less than this:
        max(rest, stock) - max(rest, fused). The model is taken as it is now: its dtype, what is frozen, and the
        autocast that is on. Labels that are ignored are counted as the others are.

        Returns: 0 where the loss is not fused with the head, or is not any more.
        Raises: ValueError for a size below 1, or a report that belongs to no model.
        """
        if self.of is None:
            raise ValueError(
                "This report belongs to no model; take the one that patch(model) returns."
            )
        if batch < 1 or seq < 1:
            raise ValueError(f"batch={batch} and seq={seq} must both be at least 1.")
        return 0 if self.forecast is None else self.forecast(self.of, batch * seq)

    def title(self) -> str:
        """What stands above the table; without who computes it for a model on the meta device, where nobody does."""
        title = f"{self.model}: {len(self.replaced)} replaced, {len(self.skipped)} skipped"
        first = next(self.of.parameters(), None) if self.of is not None else None
        return (
            title
            if first is None or first.is_meta
            else f"{title}, computed by {computed_by(first.device.type)}"
        )

    def lines(self) -> list[tuple[str, str, str, str]]:
        """The table: equal layers share a line."""
        return [
            (kind, path, f"x{count}" if count > 1 else "", by or f"(skipped: {reason})")
            for (kind, path, by, reason), count in _grouped(self.rows)
        ]

    def __str__(self) -> str:
        lines = [COLUMNS, *self.lines()]
        widths = [max(len(line[i]) for line in lines) for i in range(3)]
        padded = ("  ".join([*map(str.ljust, line, widths), line[3]]) for line in lines)
        return "\n".join([self.title(), *padded])

    def __rich__(self) -> Any:
        """What `rich.print(report)` shows: the same table, drawn."""
        from rich.markup import escape
        from rich.table import Table

        table = Table(*COLUMNS, title=escape(self.title()), title_justify="left")
        for line in self.lines():
            table.add_row(*map(escape, line), style="dim" if "(skipped" in line[3] else None)
        return table


# what the rows say is compared with the model whenever they are read; a dataclass has no other place for a property
PatchReport.rows = property(PatchReport._current, PatchReport._tell)  # type: ignore[assignment]


def _grouped(rows: list[Row]) -> Iterator[tuple[tuple[str, str, str | None, str], int]]:
    """Rows that differ only in layer numbers, with their count: `model.layers.*.mlp`, 16."""
    counts: dict[tuple[str, str, str | None, str], int] = {}
    for row in rows:
        key = (row.kind, re.sub(r"(?<=\.)\d+(?=\.|$)", "*", row.path), row.by, row.reason)
        counts[key] = counts.get(key, 0) + 1
    yield from counts.items()
