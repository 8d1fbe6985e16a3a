"""The rows of `make test-matrix` reach what is promised, and the command says what it could not run."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests import matrix
from tests.matrix import ROOT, ROWS, SAME, Row

HERE = Row("here", SAME, SAME, SAME, SAME, "ops")


def test_rows() -> None:
    assert len({row.name for row in ROWS}) == len(ROWS)
    assert {row.tests for row in ROWS} == matrix.TESTS.keys()
    assert matrix.rows("# a comment\n\nx 3.10 2.6.0 . newest zoo\n")[0].packages == [
        "torch==2.6.0",
        "transformers",
    ]
    assert HERE.packages == []


def test_oldest_and_newest() -> None:
    text = (ROOT / "pyproject.toml").read_text()
    for package in ("torch", "triton", "transformers"):
        [promised] = re.findall(rf'"{package}>=([\d.]+)', text)
        versions = {getattr(row, package) for row in ROWS}
        assert "newest" in versions
        assert any(v == promised or v.startswith(f"{promised}.") for v in versions), promised
    pythons = {row.python for row in ROWS} - {SAME}
    assert pythons == {"3.10", "3.11", "3.12", "3.13"}


@pytest.mark.parametrize(
    ("row", "arguments", "status", "said"),
    [
        (HERE, ["here", "--", "--version"], 0, "passed"),
        (HERE, ["here", "--", "--no-such-option"], 1, "failed with 4"),
        (HERE._replace(python="3.99"), [], 1, "not run: there is no python3.99 on PATH"),
        (HERE._replace(name="other"), ["here"], 2, "Unknown rows: here; known: other."),
    ],
)
def test_runs(
    row: Row,
    arguments: list[str],
    status: int,
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(matrix, "ROWS", [row])
    assert matrix.main(arguments, tmp_path) == status
    found = capfd.readouterr()
    assert said in found.out + found.err


def test_an_environment_is_made_once_for_some_releases(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    python = matrix.environment(HERE, tmp_path)
    marker = python.parent / "marker"
    marker.touch()
    assert matrix.environment(HERE, tmp_path) == python
    assert marker.exists()
    assert matrix.environment(HERE._replace(name="other", tests="all"), tmp_path) == python

    def fail(*args: object, **kwargs: object) -> None:
        raise matrix.subprocess.CalledProcessError(1, "pip")

    monkeypatch.setattr(matrix.subprocess, "run", fail)
    assert "could not be made" in str(matrix.run(HERE._replace(triton="0"), [], tmp_path))
    assert {ready.parent for ready in tmp_path.glob("*/.ready")} == {python.parent.parent}


def test_a_row_runs_a_sample(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first case of every test, and every case of what is named."""
    pytester = tmp_path / "test_x.py"
    pytester.write_text(
        "import pytest\n"
        "@pytest.mark.parametrize('i', range(13))\n"
        "def test_many(i): assert i in (0, 6, 12)\n"
        "def test_one(): pass\n"
    )
    monkeypatch.setattr(matrix, "TESTS", {"ops": [str(pytester)]})
    monkeypatch.setenv(matrix.EVERY, "6")
    assert matrix.run(HERE, ["-x"], tmp_path) is None
    assert matrix.run(HERE, [str(pytester)], tmp_path) == "failed with 1"
