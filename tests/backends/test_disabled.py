"""The list of ops that selftest found wrong: what it does to dispatch, and when it lapses."""

from __future__ import annotations

import dataclasses
import json
import os
import stat
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from liger_kernel import backends
from liger_kernel.backends import disabled, kernels_of
from liger_kernel.backends.records import Backend
from liger_kernel.backends.triton import TRITON
from liger_kernel.ops.rms_norm import rms_norm

CPU = backends.facts_of(torch.device("cpu")).name
TRITON_BY_CHOICE = Backend("cpu", ("cpu",), backends.cpu.facts, implementation=TRITON)


@pytest.fixture(autouse=True)
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty list, and a CPU that the kernels serve without being asked, as they serve a GPU."""
    given = tmp_path / "deep" / "disabled.json"
    monkeypatch.setenv(disabled.VARIABLE, str(given))
    before = backends.BACKENDS["cpu"]
    backends.register(TRITON_BY_CHOICE)
    yield given
    monkeypatch.undo()
    backends.register(before)


def entry(**changes: Any) -> disabled.Entry:
    return dataclasses.replace(
        disabled.Entry.here("rms_norm", "triton", CPU, "off by 7"), **changes
    )


def computed_by(op: str = "rms_norm") -> Any:
    backends.forget()
    return kernels_of(op, torch.empty(1))


def write(*entries: disabled.Entry) -> None:
    disabled.write(entries)
    backends.forget()


def test_an_op_is_computed_by_its_reference_and_one_warning_says_why(file: Path) -> None:
    assert computed_by().__name__ == "liger_kernel.ops.rms_norm.triton"
    write(entry())
    x, weight = torch.randn(3, 8), torch.randn(8)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = [rms_norm(x, weight) for _ in range(3)]
        assert type(kernels_of("rms_norm", x)).__name__ == "Recompute"
        assert kernels_of("glu", x).__name__ == "liger_kernel.ops.glu.triton"
    with backends.use_implementation("reference"):
        assert torch.equal(found[0], rms_norm(x, weight))
    (warning,) = caught
    for part in ("rms_norm", "off by 7", CPU, str(file), "selftest --reset"):
        assert part in str(warning.message)


def test_an_explicit_request_is_refused_and_the_file_named(file: Path) -> None:
    write(entry())
    with (
        backends.use_implementation("triton"),
        pytest.raises(RuntimeError, match="off by 7") as error,
    ):
        rms_norm(torch.randn(3, 8), None)
    assert str(file) in str(error.value)
    with warnings.catch_warnings(), backends.use_implementation("reference"):
        warnings.simplefilter("error")
        rms_norm(torch.randn(3, 8), None)


@pytest.mark.parametrize(
    "changes",
    [
        {"device": "another device"},
        {"torch": "2.0"},
        {"triton": "0.1"},
        {"liger_kernel": "0.0.1"},
        {"implementation": "dummy"},
        {"op": "glu"},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_an_entry_for_something_else_does_nothing(changes: dict[str, str]) -> None:
    write(entry(**changes))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert computed_by().__name__ == "liger_kernel.ops.rms_norm.triton"


NO_TEXT = json.dumps([dataclasses.asdict(disabled.Entry.here("a", "b", "c", "d")) | {"op": []}])


@pytest.mark.parametrize(
    "text",
    ["{", "{}", "null", '{"op": 1}', '[{"op": "rms_norm"}]', "7", NO_TEXT, "[" * 100_000],
    ids=lambda text: text[:20],
)
def test_a_file_that_cannot_be_read_is_told_and_disables_nothing(file: Path, text: str) -> None:
    file.parent.mkdir()
    file.write_text(text)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert computed_by().__name__ == "liger_kernel.ops.rms_norm.triton"
        kernels_of("glu", torch.empty(1))
    (warning,) = caught
    assert "cannot be read" in str(warning.message)
    assert str(file) in str(warning.message)


def test_no_entry_is_no_file(file: Path) -> None:
    write(entry())
    assert disabled.read() == [entry()]
    assert [f.name for f in file.parent.iterdir()] == [file.name]
    write()
    assert not file.exists()
    assert disabled.read() == []


def test_what_is_no_regular_file_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """LIGER_KERNEL_DISABLED_FILE=/dev/null, in a container where the user may remove it."""
    special = tmp_path / "special"
    os.mkfifo(special)
    monkeypatch.setenv(disabled.VARIABLE, str(special))
    assert disabled.read() == []
    write()
    assert stat.S_ISFIFO(special.stat().st_mode)
    with pytest.raises(OSError, match="no regular file"):
        write(entry())
    assert stat.S_ISFIFO(special.stat().st_mode)


def test_the_file_lies_in_the_cache_of_the_user(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv(disabled.VARIABLE)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert disabled.path() == tmp_path / ".cache/liger_kernel/disabled.json"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "x"))
    assert disabled.path() == tmp_path / "x/liger_kernel/disabled.json"
