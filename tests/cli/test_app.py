"""Parsing, presenting and refusing, with typer and rich and without."""

from __future__ import annotations

import inspect
import json
import os
import subprocess
import sys
import warnings

import pytest

import liger_kernel
from liger_kernel.cli import app, present
from liger_kernel.cli.answer import Answer, Table, size
from liger_kernel.cli.parse import parameters, parse
from tests.cli.conftest import Run


def fits(text: str) -> bool:
    return all(len(line) <= 80 for line in text.splitlines()) and "\x1b" not in text


def test_help(run: Run, both: str) -> None:
    for argv in ((), ("--help",), ("-h",), *((name, "--help") for name in app.COMMANDS)):
        done = run(*argv)
        assert (done.status, done.err) == (0, "")
        assert fits(done.out)
        assert "env" in done.out or "--json" in done.out


def test_version(run: Run, both: str) -> None:
    done = run("--version")
    assert (done.status, done.out, done.err) == (
        0,
        f"liger_kernel {liger_kernel.__version__}\n",
        "",
    )
    assert "--version" in run("--help").out


def test_progress_where_stderr_is_a_file(capsys: pytest.CaptureFixture[str]) -> None:
    assert list(present.track(range(123), "test", 123)) == [*range(123)]
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 10
    assert lines[-1] == "test: 123 of 123"
    assert list(present.track(range(5), "test", 5)) == [*range(5)]
    assert capsys.readouterr().err == ""


def test_both_parsers_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("typer")
    asked = [
        ["env"],
        ["env", "--json"],
        ["selftest", "--op", "glu", "--op", "rope", "--interpret"],
        ["selftest", "--reset", "--dtype", "float32"],
    ]
    by_typer = [parse(app.COMMANDS, argv) for argv in asked]
    monkeypatch.setitem(sys.modules, "typer", None)
    assert [parse(app.COMMANDS, argv) for argv in asked] == by_typer
    name, given, as_json = by_typer[2] or ("", {}, True)
    assert (name, as_json) == ("selftest", False)
    assert given == {
        "op": ["glu", "rope"],
        "dtype": None,
        "interpret": True,
        "reset": False,
        "jobs": 0,
    }


@pytest.mark.parametrize(
    "argv",
    [["nothing"], ["env", "--nothing"], ["env", "more"], ["selftest", "--op"], ["--json"]],
    ids=" ".join,
)
def test_bad_arguments_are_one_line_and_status_2(run: Run, both: str, argv: list[str]) -> None:
    done = run(*argv)
    assert done.status == 2
    assert done.out == ""
    assert done.err.startswith("liger_kernel: ")
    assert done.err.count("\n") == 1
    assert "--help" in done.err
    if argv[0] in app.COMMANDS:
        assert f"liger_kernel {argv[0]} --help" in done.err


@pytest.mark.parametrize("command", app.COMMANDS.values(), ids=list(app.COMMANDS))
def test_every_argument_is_explained(command: app.Command) -> None:
    assert inspect.getdoc(command)
    assert all(p.help.endswith(".") for p in parameters(command))


def test_tables_wrap(capsys: pytest.CaptureFixture[str], both: str, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setenv("COLUMNS", "80")
    long = "a reason of many words " * 9
    parts = ["", Table("[red]title", ["a", "b"], [["x" * 90, long], ["[bold]y", ""]]), long]
    present.present(Answer({}, parts))
    out = capsys.readouterr().out
    assert fits(out)
    assert "[red]title" in out
    assert "[bold]y" in out
    assert out.count("reason") == 18
    present.present(Answer({"a": [1]}, parts), as_json=True)
    assert json.loads(capsys.readouterr().out) == {"a": [1]}


def test_size() -> None:
    assert [size(n) for n in (3, 2048, 3 << 20, 5 << 40)] == [
        "3 bytes",
        "2.00 KiB",
        "3.00 MiB",
        "5,120.00 GiB",
    ]


def test_an_unknown_implementation_in_the_environment_is_one_line() -> None:
    program = (
        "import os, sys; os.environ['LIGER_KERNEL_IMPL'] = 'bogus'; sys.argv = ['liger_kernel', 'env'];"
        "import runpy; runpy.run_module('liger_kernel', run_name='__main__')"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.count("\n") == 1
    assert "bogus" in done.stderr
    assert "reference" in done.stderr


def python(
    *argv: str, stdout: str = os.devnull, plain: bool = False, setup: str = ""
) -> subprocess.CompletedProcess[str]:
    """`main(argv)` in a process of its own, where `env` answers with some text."""
    program = f"""
import sys
if {plain}:
    sys.modules["rich"] = None
{setup}
from liger_kernel.cli import app
from liger_kernel.cli.answer import Answer
app.COMMANDS["env"] = lambda: Answer({{}}, ["a line of text"] * 2000)
sys.exit(app.main({argv}))
"""
    with open(stdout, "w") as out:
        command = [sys.executable, "-c", program]
        return subprocess.run(command, stdout=out, stderr=subprocess.PIPE, text=True, check=False)


@pytest.mark.parametrize("plain", [True, False])
def test_a_reader_that_leaves_early(plain: bool) -> None:
    program = f"""
import sys
if {plain}:
    sys.modules["rich"] = None
from liger_kernel.cli import app
from liger_kernel.cli.answer import Answer
app.COMMANDS["env"] = lambda: Answer({{}}, ["a line of text"] * 20000)
sys.exit(app.main(["env"]))
"""
    command = [sys.executable, "-c", program]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.readline()
        process.stdout.close()
        assert process.stderr.read() == b""


@pytest.mark.parametrize("plain", [True, False])
def test_a_full_disk_is_one_line(plain: bool) -> None:
    done = python("env", stdout="/dev/full", plain=plain)
    assert (done.returncode, done.stderr.count("\n")) == (1, 1), done.stderr
    assert "cannot be printed" in done.stderr
    assert "No space left" in done.stderr


def test_a_closed_output_is_no_traceback() -> None:
    done = python("env", setup="sys.stdout = None")
    assert (done.returncode, done.stderr) == (0, "")


def test_a_number_that_is_none_is_named(run: Run, both: str) -> None:
    for text in ("abc", "", "1.5"):
        done = run("estimate", "llama", "--batch", text)
        assert (done.status, done.err.count("\n")) == (2, 1)
        assert f"{text!r}" in done.err
        assert "--batch" in done.err


def test_half_of_an_option_is_none(run: Run, both: str) -> None:
    done = run("estimate", "llama", "--check")
    assert (done.status, done.err.count("\n")) == (2, 1)
    assert "--check" in done.err


def test_what_others_will_change_is_not_told(
    run: Run, monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    def warned() -> Answer:
        warnings.warn("deprecated in v6", FutureWarning, stacklevel=1)
        warnings.warn("wrong now", UserWarning, stacklevel=1)
        return Answer({}, ["done"])

    monkeypatch.setitem(app.COMMANDS, "env", warned)
    assert run("env").status == 0
    assert [str(w.message) for w in recwarn] == ["wrong now"]


def test_an_interrupt_is_no_traceback(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted() -> None:
        raise KeyboardInterrupt

    monkeypatch.setitem(app.COMMANDS, "env", interrupted)
    assert run("env") == (130, "", "")


def test_help_imports_no_torch() -> None:
    program = (
        "import sys; from liger_kernel.cli.app import main; main([]);"
        "sys.exit('torch' in sys.modules or 'liger_kernel.testing' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
