"""The benchmark's command line, and the processes that it starts."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmark import __main__ as command_line
from benchmark import children, cpu, longest, run, sources
from tests import in_children


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("", "unknown command ''; known: run, e2e, sharded, losses, trl_head, cpu"),
        ("walk", "unknown command 'walk'"),
        ("run --walk", "unrecognized arguments: --walk"),
        ("run no_such_op --device cpu", "unknown op no_such_op; known: attn_res, cross_entropy"),
        ("run rms_norm --case none-such --device cpu", "no case none-such in rms_norm"),
        ("run rms_norm --device cpu --base none-such", "--base none-such is neither a folder"),
        ("run rms_norm --device cpu --providers base", "provider base needs --base"),
        ("e2e --modes incumbent --device cpu", "mode incumbent needs --peer-site"),
        ("losses --shape huge --device cpu", "invalid choice: 'huge'"),
        ("host no_such_op --device cpu", "unknown op no_such_op"),
        ("longest --device cpu", "--device cpu needs --limit"),
        ("sharded --device cpu --how zero", "unknown --how zero; known: ddp, fsdp2"),
        ("tables none-such.json", "no file none-such.json"),
        ("results into.json", "no file to merge into into.json"),
    ],
)
def test_a_wrong_command_ends_with_one_line(
    command: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        code: Any = command_line.main(command.split())
    except SystemExit as ended:
        code = ended.code
    assert code == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert message in err
    assert err.startswith("python -m benchmark")
    assert len(err.splitlines()) == 1


def test_every_command_has_a_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert command_line.main(["--help"]) == 0
    shown = capsys.readouterr().out
    assert all(f"python -m benchmark {name} " in shown for name in command_line.COMMANDS)
    for name in command_line.COMMANDS:
        with pytest.raises(SystemExit) as ended:
            command_line.main([name, "--help"])
        assert ended.value.code == 0
        assert f"python -m benchmark {name}" in capsys.readouterr().out


def test_another_liger_kernel_is_not_measured_by_mistake(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert sources.not_ours() is None
    monkeypatch.setattr(sources, "ROOT", Path("/elsewhere"))
    assert command_line.main(["host", "--device", "cpu"]) == 2
    assert "not from /elsewhere/src: set PYTHONPATH=src" in capsys.readouterr().err


BASE = """
from types import SimpleNamespace
def specs(): return {"rms_norm": SimpleNamespace(function=lambda x, weight, **options: x * weight)}
"""


def test_the_base_may_be_a_folder(tmp_path: Path) -> None:
    """Measured on our inputs; its op multiplies wrongly on purpose, so that it cannot be mistaken for ours."""
    package = tmp_path / "src" / "liger_kernel"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "testing.py").write_text(BASE)
    file = tmp_path / "results.json"
    command = ["rms_norm", "glu", "--providers", "base", "--mode", "fwd", "--device", "cpu"]
    assert run.main([*command, "--base", str(tmp_path), "--json", str(file)]) == 0
    rows = json.loads(file.read_text())["ops"]
    assert [(row["op"], row["provider"]) for row in rows] == [("rms_norm", "base")]
    assert "wrong numbers" in rows[0]["error"]


def test_the_base_may_be_a_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "src" / "liger_kernel" / "__init__.py"
    file.parent.mkdir(parents=True)
    file.write_text("old")
    identity = ["-c", "user.name=n", "-c", "user.email=e"]
    for git in (["init", "-q"], ["add", "."], [*identity, "commit", "-qm", "old"]):
        subprocess.run(["git", "-C", str(tmp_path), *git], check=True)
    file.write_text("new")
    monkeypatch.setattr(sources, "ROOT", tmp_path)
    assert sources.is_commit("HEAD")
    with sources.folder_of("base", "peers", "HEAD") as folder:
        assert folder is not None
        assert (Path(folder) / "liger_kernel" / "__init__.py").read_text() == "old"
    assert not Path(folder).exists()
    with sources.folder_of("ours", "peers", "HEAD") as folder:
        assert folder == "peers"


def test_children_take_turns(tmp_path: Path) -> None:
    file, log = tmp_path / "order", tmp_path / "log"
    a = children.rows(in_children.in_steps, file, "a", 3, log=log)
    b = children.rows(in_children.in_steps, file, "b", 2)
    assert [next(a), next(b), next(a)] == [0, 0, 1]
    assert file.read_text() == "a0 b0 a1 "
    assert list(a) == [2]
    assert log.read_text() == "done\n"
    b.close()
    assert file.read_text() == "a0 b0 a1 a2 "


@pytest.mark.parametrize(("how", "code"), [("raises", 1), ("exits", 3)])
def test_a_child_that_ends_early_is_an_error(how: str, code: int) -> None:
    rows = children.rows(in_children.fails, how)
    assert next(rows) == "one"
    with pytest.raises(children.ChildError, match=f"ended with code {code}"):
        next(rows)


def test_ops_on_a_processor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every column has a time, in both dtypes; but Inductor's, which would compile for half a minute."""
    columns = tuple(name for name in cpu.COLUMNS if name != "inductor")
    monkeypatch.setattr(cpu, "COLUMNS", columns)
    path, threads = tmp_path / "found.json", torch.get_num_threads()
    try:
        assert command_line.main(["cpu", "group_norm", "--turns", "1", "--json", str(path)]) == 0
    finally:
        torch.set_num_threads(threads)
    rows = json.loads(path.read_text())["ops"]
    assert {(r["provider"], r["dtype"]) for r in rows} == {
        (name, dtype) for name in columns for dtype in ("float32", "bfloat16")
    }
    assert all(r["ms"] > 0 for r in rows)


@pytest.mark.parametrize("waste", [0.0, 0.05])
def test_the_longest_sequence_is_found_in_few_steps(waste: float) -> None:
    """Of a peak that is a line, `waste` of which the allocator cannot use."""
    tried = []

    def trial(seq: int) -> dict[str, Any] | None:
        tried.append(seq)
        peak = 18.0 + 80e-6 * seq
        return {"seq": seq, "peak_gb": peak} if peak * (1 + waste) <= 80 else None

    best = longest.search(trial, 80e9, [32768, 65536])
    exact = (80 / (1 + waste) - 18) / 80e-6
    assert 0.985 * exact <= best <= exact
    assert len(tried) <= 8


def test_the_search_ends_when_time_is_up() -> None:
    def trial(seq: int) -> dict[str, Any]:
        if seq > 65536:
            raise longest.OutOfTime
        return {"seq": seq, "peak_gb": 18.0 + 80e-6 * seq}

    assert longest.search(trial, 80e9, [32768, 65536]) == 65536


def test_a_deeper_model_is_forecast_from_two_depths() -> None:
    def rows(layers: int) -> list[dict[str, Any]]:
        peaks = ((s, 2 + 0.5 * layers + (80 + layers) * 1e-6 * s) for s in (1000, 500_000))
        of_run = {"layers": layers, "room_gb": 80.0}
        return [{**of_run, "seq": s, "peak_gb": peak} for s, peak in peaks]

    told = longest.forecast(rows(2) + rows(4), 32, 4096)
    assert "18.00 GB + 112.00 kB a token; in the 44.0 GB that were used of 80.0: 232,142" in told
    assert "needed, 1 are there" in longest.forecast(rows(2), 32, 4096)
