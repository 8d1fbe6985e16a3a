"""`bench`: what it measures and how it fails."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from liger_kernel import backends
from liger_kernel.cli import bench
from liger_kernel.testing import specs
from tests.cli.conftest import Run

ONE = ("bench", "relu_squared", "--no-compile", "--dtype", "float32")


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "BUDGET", 0.0)


def test_bench(run: Run, both: str) -> None:
    done = run(*ONE)
    assert done.status == 0
    assert "eager" in done.out
    assert "x as fast" in done.out
    data = run(*ONE, "--json").data
    assert len(data["cases"]) == 2
    assert data["by"] == "reference"
    for found in data["cases"]:
        for result in found["results"].values():
            assert result["ms"] > 0
            assert result["rounds"] == bench.FEWEST
            assert result["gb_s"] > 0


@pytest.mark.parametrize("op", specs())
def test_every_op_can_be_measured(run: Run, op: str) -> None:
    done = run("bench", op, "--no-compile", "--case", specs()[op].cases[0].id, "--json")
    (found,) = done.data["cases"]
    assert {name for name, result in found["results"].items() if "ms" in result} == {
        "ours",
        "eager",
    }


def test_compiled_code_is_measured_beside(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda function, dynamic: function)
    (found, _) = run(*ONE[:2], "--json").data["cases"]
    assert found["results"].keys() == {"ours", "eager", "compile"}


def test_who_cannot_run_is_left_out(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: Any, **options: Any) -> Any:
        raise torch.OutOfMemoryError("no memory\nat all")

    monkeypatch.setattr(torch, "compile", lambda function, dynamic: broken)
    done = run(*ONE[:2])
    assert done.status == 0
    assert "no memory at all" in " ".join(done.out.split())


def test_the_requested_implementation_is_measured(run: Run) -> None:
    with backends.use_implementation("triton"):
        assert run(*ONE, "--case", "odd", "--json").status == 2
        case = specs()["relu_squared"].cases[0].id
        assert run(*ONE, "--case", case, "--json").data["by"] == "triton"


def test_a_request_that_nobody_serves_is_one_line(run: Run) -> None:
    with backends.use_implementation("npu"):
        done = run(*ONE)
    assert (done.status, done.out, done.err.count("\n")) == (2, "", 1)
    assert "LIGER_KERNEL_IMPL='npu' cannot serve" in done.err


def test_calls_take_turns() -> None:
    order: list[str] = []
    times = bench.rounds({name: lambda n=name: order.append(n) for name in "ab"}, "cpu")  # type: ignore[misc]
    assert order[:4] == ["a", "b", "a", "b"]
    assert len(times["a"]) == len(times["b"]) == bench.FEWEST


@pytest.mark.parametrize(
    "argv", [("nope",), ("rope", "--case", "nope"), ("rope", "--dtype", "nope")]
)
def test_bad_input(run: Run, argv: tuple[str, ...]) -> None:
    done = run("bench", *argv)
    assert (done.status, done.out, done.err.count("\n")) == (2, "", 1)
    assert "nope" in done.err
    assert "known: " in done.err
