"""`liger_kernel inspect`: what `patch` would do to a model, without its weights."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from liger_kernel import backends
from liger_kernel.cli import models
from liger_kernel.cli.answer import Answer, Table, said
from liger_kernel.cli.slow_paths import slow_paths
from liger_kernel.transformers.patching import patch
from liger_kernel.transformers.patching.report import COLUMNS, PatchReport


def one_step(model: Any) -> str | None:
    """Run a patched model on paper: some losses turn out to need logits. Returns why it could not run, if so."""
    given = models.inputs(model, 1, 8)
    try:
        # whoever was asked for by name serves no tensors without numbers
        with models.runnable(), backends.use_implementation(None):
            model(**given, labels=given["input_ids"])
    except Exception as error:  # a forward that needs numbers, or images
        return said(error)
    return None


def report_table(report: PatchReport) -> Table:
    return Table(report.title(), COLUMNS, report.lines())


def answer(model: str, download: bool) -> Answer:
    made = models.on_paper(model, download)
    report = patch(made)
    failed = one_step(made)
    slow = list(slow_paths(made))
    n_parameters = sum(p.numel() for p in made.parameters())
    parts: list[Table | str] = [report_table(report)]
    if slow:
        parts.append(Table("Slow in HuggingFace's own code", (), [[line] for line in slow]))
    if failed is not None:
        parts.append(
            f"No step could be tried without weights ({failed}). Some models turn out to need logits only in a step: "
            "after the first real one, print the report again and look at the row of the loss."
        )
    parts.append(f"{n_parameters:,} parameters, none of them in memory.")
    data = {
        "model": report.model,
        "parameters": n_parameters,
        "rows": [asdict(row) for row in report.rows],
        "slow": slow,
        "step": failed or "ran",
    }
    return Answer(data, parts)
