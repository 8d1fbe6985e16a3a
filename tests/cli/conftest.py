"""Every command runs with typer and rich and without them, and never reads the user's own list of disabled ops."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from liger_kernel import backends
from liger_kernel.backends import disabled
from liger_kernel.cli.app import main


class Done(NamedTuple):
    status: int
    out: str
    err: str

    @property
    def data(self) -> Any:
        return json.loads(self.out)


Run = Callable[..., Done]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    monkeypatch.setenv("COLUMNS", "80")

    def run(*argv: str) -> Done:
        capsys.readouterr()
        status = main(argv)
        return Done(status, *capsys.readouterr())

    return run


@pytest.fixture(params=["typer and rich", "neither"])
def both(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "neither":
        for name in ("typer", "rich"):
            monkeypatch.setitem(sys.modules, name, None)
    else:
        pytest.importorskip("typer")
    return request.param


@pytest.fixture(autouse=True)
def disabled_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    path = tmp_path / "disabled.json"
    monkeypatch.setenv(disabled.VARIABLE, str(path))
    backends.forget()
    yield path
    monkeypatch.undo()
    backends.forget()
