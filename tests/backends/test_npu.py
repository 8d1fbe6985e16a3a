"""The backend for Ascend NPUs, on a stand-in for the device and for torch_npu (`tests/npu_stand_in`).

A process has the device for good, so each of these tests runs pytest in one of its own.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from liger_kernel import backends
from liger_kernel.backends import npu
from liger_kernel.ops.rms_norm import rms_norm
from tests.npu_stand_in import device

ROOT = Path(__file__).resolve().parents[2]
STAND_IN = "tests/npu_stand_in"
needs_stand_in = pytest.mark.skipif(
    not device.can_register(), reason="this PyTorch registers no device from Python"
)


def run(*arguments: str) -> None:
    command = [sys.executable, "-m", "pytest", "-p", "tests.npu_stand_in.plugin", "-x"]
    done = subprocess.run(
        [*command, "-p", "no:cacheprovider", "-o", "addopts=", "-q", *arguments],
        cwd=ROOT,
        env={**os.environ, "TEST_DEVICE": "npu"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert " passed" in done.stdout


@needs_stand_in
@pytest.mark.parametrize("what", ["device", "dispatch", "models"])
def test_on_the_stand_in(what: str) -> None:
    run(f"{STAND_IN}/checks_{what}.py")


@needs_stand_in
def test_every_op_by_the_one_rule() -> None:
    """The generic tests of the ops; without a file for the NPU, an op's first case."""
    run("tests/ops/test_ops.py", "-k", "npu")


# --- without the device ---------------------------------------------------------------------------


def test_it_is_known_and_serves_no_other_device() -> None:
    assert backends.BACKENDS["npu"] is npu.BACKEND
    assert npu.unavailable("cpu") == "torch_npu computes on npu devices"
    with (
        backends.use_implementation("npu"),
        pytest.raises(RuntimeError, match="LIGER_KERNEL_IMPL='npu' cannot serve a tensor on 'cpu'"),
    ):
        rms_norm(torch.ones(2, 4), None)


@pytest.mark.parametrize(
    ("source", "said"),
    [
        (None, "the package 'torch_npu' is not installed"),
        (
            "raise OSError('libascendcl.so: cannot open shared object file')",
            "the package 'torch_npu' cannot be imported: OSError: libascendcl.so: cannot open shared object file",
        ),
        (
            "import a_missing_friend",
            "the package 'torch_npu' cannot be imported, since 'a_missing_friend' is not installed",
        ),
    ],
)
def test_a_missing_or_broken_torch_npu_is_named(
    source: str | None, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if source is not None:
        (tmp_path / "torch_npu.py").write_text(source)
        monkeypatch.syspath_prepend(tmp_path)
    assert npu.unavailable("npu") == said
    with pytest.raises(RuntimeError, match=r"LIGER_KERNEL_IMPL='npu' cannot serve .* 'npu': the p"):
        backends.implementation_for("npu", "npu")
    assert backends.implementation_for("npu") is None, "by device: the reference"


def test_streams_are_used_where_there_are_some(monkeypatch: pytest.MonkeyPatch) -> None:
    class Runtime:
        device = None
        get_device_name = str
        current_stream = stream = Stream = None

    monkeypatch.setattr(torch, "npu", Runtime, raising=False)
    assert npu.facts(torch.device("cpu")).streams is None, "not all that the library asks for"
    monkeypatch.setattr(Runtime, "is_current_stream_capturing", None, raising=False)
    assert npu.facts(torch.device("cpu")).streams is Runtime
