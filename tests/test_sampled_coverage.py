"""The plugin that makes CI's coverage cheap leaves out cases of a test, and no test without cases."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.compatibility import ROOT
from tests.sampled_coverage import is_sampled

CASES = 40


def test_lines_of_sampled_cases_are_found(tmp_path: Path) -> None:
    pytest.importorskip("pytest_cov")
    functions = [f"def f{case}():\n    return {case}" for case in range(CASES + 1)]
    (tmp_path / "traced.py").write_text("\n".join(functions))
    (tmp_path / "test_it.py").write_text(
        "import pytest, traced\n"
        f"@pytest.mark.parametrize('case', range({CASES}))\n"
        "def test_case(case): getattr(traced, f'f{case}')()\n"
        f"def test_alone(): traced.f{CASES}()\n"
    )
    command = [sys.executable, "-m", "pytest", "--cov=traced", "--cov-report=json"]
    subprocess.run(
        [*command, "-p", "tests.sampled_coverage", "test_it.py"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        check=True,
    )
    lines = json.loads((tmp_path / "coverage.json").read_text())["files"]["traced.py"]
    sampled = {case for case in range(CASES) if is_sampled(f"test_it.py::test_case[{case}]")}
    alone = [CASES] if is_sampled("test_it.py::test_alone") else []
    bodies = {2 * (case + 1) for case in (*sampled, *alone)}
    assert {line for line in lines["executed_lines"] if line % 2 == 0} == bodies
    assert (len(sampled) == CASES) == (sys.version_info >= (3, 12))
    assert sampled
