"""What `patch` did, and what it left alone and why."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Row:
    """One place in the model. `by` names the replacement, or is None where `reason` says why there is none."""

    kind: str  # "loss", "norm", "mlp", "rope"
    path: str
    by: str | None = None
    reason: str = ""


@dataclass
class PatchReport:
    """The result of `liger_kernel.patch`: rows, and a table when printed (equal layers share a line)."""

    model: str
    rows: list[Row] = field(default_factory=list)

    @property
    def replaced(self) -> list[Row]:
        return [row for row in self.rows if row.by is not None]

    @property
    def skipped(self) -> list[Row]:
        return [row for row in self.rows if row.by is None]

    def add(self, kind: str, path: str, by: str | None = None, reason: str = "") -> None:
        self.rows.append(Row(kind, path, by, reason))

    def __str__(self) -> str:
        lines = [("kind", "modules", "", "replaced by")]
        for (kind, path, by, reason), count in _grouped(self.rows):
            lines.append(
                (kind, path, f"x{count}" if count > 1 else "", by or f"(skipped: {reason})")
            )
        widths = [max(len(line[i]) for line in lines) for i in range(3)]
        head = f"{self.model}: {len(self.replaced)} replaced, {len(self.skipped)} skipped"
        return "\n".join(
            [
                head,
                *(
                    "  ".join([*(c.ljust(w) for c, w in zip(line, widths, strict=False)), line[3]])
                    for line in lines
                ),
            ]
        )


def _grouped(rows: list[Row]) -> Iterator[tuple[tuple[str, str, str | None, str], int]]:
    """Rows that differ only in layer numbers, with their count: `model.layers.*.mlp`, 16."""
    counts: dict[tuple[str, str, str | None, str], int] = {}
    for row in rows:
        key = (row.kind, re.sub(r"(?<=\.)\d+(?=\.|$)", "*", row.path), row.by, row.reason)
        counts[key] = counts.get(key, 0) + 1
    yield from counts.items()
