"""Versions that stand in two files are the same in both."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def found(file: str, pattern: str) -> list[str]:
    matches = re.findall(pattern, (ROOT / file).read_text(encoding="utf-8"), re.MULTILINE)
    assert matches, f"{file} says nothing like {pattern}"
    return matches


def test_pre_commit_runs_the_pinned_ruff() -> None:
    pinned = found("requirements-dev.txt", r"^ruff==(\S+)")
    assert found(".pre-commit-config.yaml", r"ruff-pre-commit\n\s*rev: v(\S+)") == pinned


def test_ci_runs_the_oldest_versions_that_are_promised() -> None:
    for package in ("torch", "transformers"):
        promised = found("pyproject.toml", rf'"{package}>=([\d.]+)"')[0]
        assert set(found(".github/workflows/ci.yml", rf"\b{package}==([\d.]+)\.\*")) == {promised}
    pythons = found(".github/workflows/ci.yml", r"python: \[(.+)\]")[0].replace('"', "").split(", ")
    assert pythons[0] == found("pyproject.toml", r'requires-python = ">=([\d.]+)"')[0]
    assert pythons == ["3.10", "3.11", "3.12", "3.13"]
