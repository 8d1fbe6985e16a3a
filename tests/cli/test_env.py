"""`env` and the report that bug reports paste."""

from __future__ import annotations

import importlib.metadata
import sys
from pathlib import Path

import pytest
import torch

import liger_kernel
from liger_kernel import backends, env_report
from liger_kernel.backends import disabled
from liger_kernel.cli import installed
from liger_kernel.ops import OPS
from tests.cli.conftest import Run


def test_env(run: Run, both: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LIGER_KERNEL_RATIOS", "somewhere")
    done = run("env")
    assert done.status == 0
    for part in (torch.__version__, liger_kernel.__version__, "LIGER_KERNEL_RATIOS", *OPS):
        assert part in done.out
    data = run("env", "--json").data
    assert data["versions"]["triton"] == importlib.metadata.version("triton")
    assert data["variables"]["LIGER_KERNEL_RATIOS"] == "somewhere"
    assert data["devices"][0]["name"] == "CPU"
    assert data["implementations"].keys() == OPS.keys()


def test_env_report(capsys: pytest.CaptureFixture[str]) -> None:
    env_report.print_env_report()
    assert torch.__version__ in capsys.readouterr().out


def test_env_says_what_is_requested(run: Run) -> None:
    with backends.use_implementation("triton"):
        found = run("env", "--json").data["implementations"]
    assert found["gated_mlp"]["cpu"] == "triton"
    assert found["cross_entropy"]["cpu"] == "triton"
    found = run("env", "--json").data["implementations"]
    assert {found[op]["cpu"] for op in OPS} == {"reference", "portable"}


def test_env_says_what_is_disabled(run: Run) -> None:
    disabled.write([disabled.Entry.here("glu", "triton", "CPU", "off by 7")])
    backends.forget()
    with backends.use_implementation("triton"):
        found = run("env", "--json").data["implementations"]
    assert "off by 7" in found["gated_mlp"]["cpu"]
    assert found["rope"]["cpu"] == "triton"


def package(folder: Path) -> Path:
    made = folder / "liger_kernel"
    made.mkdir(parents=True)
    (made / "__init__.py").touch()
    return made


def hows() -> dict[str, str]:
    return {other.where: other.how for other in installed.others()}


def test_a_package_of_the_same_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, last = package(tmp_path / "first"), package(tmp_path / "last")
    ours = str(installed.ours().parent)
    monkeypatch.setattr(sys, "path", [str(first.parent), ours, str(last.parent), ours])
    assert hows()[str(first)].startswith("shadows ours")
    assert hows()[str(last)] == "shadowed by ours"
    assert str(installed.ours()) not in hows()


def test_metadata_of_another_version(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = tmp_path / "liger_kernel-0.8.5.dist-info"
    made.mkdir()
    (made / "METADATA").write_text("Metadata-Version: 2.1\nName: liger-kernel\nVersion: 0.8.5\n")
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    whats = [other.what for other in installed.others()]
    assert "liger-kernel 0.8.5" in whats


def test_files_of_another_package_among_ours(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = package(tmp_path)
    (made / "ops").mkdir()
    (made / "ops" / "rms_norm.py").touch()
    monkeypatch.setattr(installed, "ours", lambda: made)
    assert "mixed" in hows()[str(made)]
