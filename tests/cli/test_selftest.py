"""`selftest`: what it runs, what it writes down, and what it refuses."""

from __future__ import annotations

import functools
import re
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import pytest
import torch

from liger_kernel import backends
from liger_kernel.backends import disabled
from liger_kernel.cli import selftest
from liger_kernel.ops.glu import triton as glu
from liger_kernel.ops.relu_squared import triton as relu_squared
from tests.cli.conftest import Run

ONE = ("selftest", "--op", "relu_squared", "--dtype", "float32")


def plant(monkeypatch: pytest.MonkeyPatch, module: Any, fault: Any) -> None:
    """Let the forward of some kernels return what `fault` makes of it."""
    right = module.forward

    @functools.wraps(right)
    def wrong(*args: Any, **kwargs: Any) -> Any:
        return fault(*right(*args, **kwargs))

    monkeypatch.setattr(module, "forward", wrong)
    monkeypatch.setattr(selftest, "SMALL", 2000)


def off_by_a_little(outputs: torch.Tensor, saved: Any) -> Any:
    return outputs * (1 + 1e-5), saved


def test_all_right(run: Run, both: str, disabled_file: Path) -> None:
    done = run(*ONE)
    assert done.status == 0
    assert done.out.count("right") >= 2
    data = run(*ONE, "--json").data
    by = {r["implementation"]: r for r in data["results"]}
    assert by["reference"]["passed"] == by["triton"]["passed"] > 5
    assert not disabled_file.exists()


def test_a_wrong_op_is_named_disabled_and_enabled_again(
    run: Run, both: str, disabled_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as planted:
        plant(planted, relu_squared, off_by_a_little)
        done = run(*ONE)
    assert done.status == 1
    assert "WRONG" in done.out
    assert "relu_squared" in done.out
    (entry,) = disabled.read()
    assert (entry.op, entry.implementation, entry.device) == ("relu_squared", "triton", "CPU")
    assert "float32" in entry.why
    with backends.use_implementation("triton"):
        with pytest.raises(RuntimeError, match="selftest found it wrong"):
            backends.kernels_of("relu_squared", torch.empty(1))
        assert run(*ONE).status == 0  # the kernels are tested all the same, and are right now
        backends.kernels_of("relu_squared", torch.empty(1))
    assert not disabled_file.exists()


def test_an_op_that_raises_is_wrong(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def fault(outputs: Any, saved: Any) -> Any:
        raise ValueError("no\nregisters")

    plant(monkeypatch, relu_squared, fault)
    assert run(*ONE).status == 1
    assert "no registers" in disabled.read()[0].why


def test_what_has_no_kernels_disables_those_it_runs(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    plant(monkeypatch, glu, off_by_a_little)
    assert run("selftest", "--op", "gated_mlp", "--dtype", "float32").status == 1
    assert [e.op for e in disabled.read()] == ["glu"]


def test_entries_of_others_stay(run: Run) -> None:
    others = [
        disabled.Entry.here("relu_squared", "triton", "another device", "x"),
        disabled.Entry.here("rope", "triton", "CPU", "x"),
    ]
    disabled.write([*others, disabled.Entry.here("relu_squared", "triton", "CPU", "x")])
    assert run(*ONE).status == 0
    assert disabled.read() == others


def test_it_stops_where_the_device_is_lost(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    plant(monkeypatch, relu_squared, off_by_a_little)
    monkeypatch.setattr(selftest, "_is_alive", lambda device_type: False)
    done = run("selftest", "--op", "relu_squared", "--op", "rope", "--dtype", "float32", "--json")
    found = {(r["op"], r["implementation"]): r for r in done.data["results"]}
    assert done.status == 1
    assert found["relu_squared", "triton"]["failed"] == 1
    assert found["rope", "triton"]["passed"] == found["rope", "triton"]["failed"] == 0


def test_by_processes(run: Run) -> None:
    """By two, of the reference and of the kernels."""
    results = run(*ONE, "--jobs", "2", "--json").data["results"]
    found = {
        r["implementation"]: r["passed"] for r in results
    }  # and the tests' own, if one has imported it
    assert found["reference"] == found["triton"] > 5


def test_a_process_that_died(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """What it should have run is run by another one; what ends every process is not run, and that is said."""
    monkeypatch.setattr(selftest, "ProcessPoolExecutor", lambda *_: ThreadPoolExecutor(1))
    dies: list[tuple[str, str]] = []
    right = selftest._tested_group

    def group(key: Any, *given: Any) -> Any:
        if dies and key[:2] in dies:
            if key[0] == "relu_squared":
                dies.remove(key[:2])
            raise BrokenProcessPool
        return right(key, *given)

    monkeypatch.setattr(selftest, "_tested_group", group)
    monkeypatch.setattr(selftest, "SMALL", 2000)
    every = ("selftest", "--op", "relu_squared", "--op", "tvd", "--dtype", "float32", "--jobs", "2")
    dies.append(("relu_squared", "triton"))
    assert run(*every).status == 0
    dies += [("relu_squared", "reference"), ("tvd", "triton")]
    done = run(*every)
    assert done.status == 1
    right_of = re.search(r"(\d+) of (\d+) are right", done.out)
    assert right_of is not None
    assert int(right_of[1]) == int(right_of[2]) - 1
    assert "a process died: tvd" in done.out


def test_reset(run: Run, both: str, disabled_file: Path) -> None:
    disabled.write([disabled.Entry.here("rope", "triton", "CPU", "x")])
    assert run("selftest", "--reset").status == 0
    assert not disabled_file.exists()
    done = run("selftest", "--reset")
    assert done.status == 0
    assert "There is no" in done.out


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (("--op", "nope"), "rms_norm"),
        (("--dtype", "int8"), "bfloat16"),
        (("--jobs", "-2"), "number of processes"),
    ],
)
def test_bad_input(run: Run, argv: tuple[str, ...], says: str) -> None:
    done = run("selftest", *argv)
    assert (done.status, done.out, done.err.count("\n")) == (2, "", 1)
    assert argv[1] in done.err
    assert says in done.err


def test_a_file_that_cannot_be_written(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv(disabled.VARIABLE, str(tmp_path / "file" / "x.json"))
    plant(monkeypatch, relu_squared, off_by_a_little)
    done = run(*ONE)
    said = " ".join(done.out.split())
    assert done.status == 1
    assert "WRONG" in said  # it took minutes to find out
    assert "cannot be written" in said
    assert "They should be: relu_squared" in said
    assert disabled.VARIABLE in said
    data = run(*ONE, "--json").data
    assert data["disabled"] == []
    assert str(tmp_path) in data["refused"]


def test_nothing_to_write_needs_no_file(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv(disabled.VARIABLE, str(tmp_path / "file" / "x.json"))
    assert run(*ONE, "--json").data["refused"] is None


def test_a_folder_in_place_of_the_file(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(disabled.VARIABLE, str(tmp_path))
    done = run(*ONE)
    assert (done.status, done.out, done.err.count("\n")) == (2, "", 1)
    assert str(tmp_path) in done.err
    assert "--reset" not in done.err  # which removes no folder
    assert disabled.VARIABLE in done.err
    done = run("selftest", "--reset")
    assert done.status == 0
    assert "stays" in done.out


def test_a_file_that_cannot_be_removed(
    run: Run, disabled_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: Any, **__: Any) -> None:
        raise PermissionError("not yours")

    disabled_file.write_text("[]")
    monkeypatch.setattr(Path, "unlink", refused)
    done = run("selftest", "--reset")
    assert (done.status, done.out, done.err.count("\n")) == (2, "", 1)
    assert f"{disabled_file} cannot be removed: not yours" in done.err


def test_a_file_that_is_no_list_of_ops_stays(run: Run, disabled_file: Path) -> None:
    disabled_file.write_text('{"mine": 1}')
    done = run(*ONE)
    assert (done.status, done.err.count("\n")) == (2, 1)
    assert str(disabled_file) in done.err
    assert disabled_file.read_text() == '{"mine": 1}'
    assert run("selftest", "--reset").status == 0
    assert not disabled_file.exists()


def test_interpret_too_late(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selftest, "INTERPRET", False)
    done = run(*ONE, "--interpret")
    assert done.status == 2
    assert "TRITON_INTERPRET=1" in done.err
