"""Every example, at a tiny size, in this process; those that take several processes start them."""

from __future__ import annotations

import importlib.util
import math
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
TINY = ("--steps", "4", "--batch", "2", "--seq", "32")

pytest.importorskip("transformers")
pytestmark = pytest.mark.usefixtures("quiet_on_one_thread")

#: example and arguments -> what must be installed; what the report shows
EXAMPLES: dict[str, tuple[str, tuple[str, ...]]] = {
    "hf_trainer": ("accelerate", ("LigerRMSNorm",)),
    "trl_trainers --trainer sft": ("trl", ("LigerSwiGLU",)),
    "trl_trainers --trainer dpo": ("trl", ("LigerSwiGLU",)),
    "trl_trainers --trainer grpo": ("trl", ("LigerSwiGLU",)),
    "plain_pytorch": ("torch", ()),
    "lora": ("peft", ("fused linear cross entropy",)),
    "moe": ("torch", ("fused linear cross entropy", "experts")),
    "vision_language": ("torch", ("fused linear cross entropy", "LigerLayerNorm")),
    "lightning_module": ("lightning", ("fused linear cross entropy",)),
    "torch_compile --backend aot_eager": ("torch", ("fused linear cross entropy",)),
    "custom_loss": ("torch", ("LigerRMSNorm", "from hidden states")),
}
LINE = re.compile(r"^loss (\S+) -> (\S+), 4 steps, \S+ s$", re.MULTILINE)


def run(
    example: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *more: str
) -> str:
    name, *arguments = example.split()
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", [name, *arguments, *more])
    runpy.run_module(f"examples.{name}", run_name="__main__", alter_sys=False)
    return capsys.readouterr().out


@pytest.mark.parametrize("example", EXAMPLES)
def test_example(
    example: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    package, shown = EXAMPLES[example]
    pytest.importorskip(package)
    torch.manual_seed(0)
    out = run(example, monkeypatch, capsys, *TINY)
    [(first, last)] = LINE.findall(out)
    if "grpo" not in example:  # whose loss is an advantage, and begins at 0
        assert (
            math.log(257) * 0.8 < float(first) < math.log(257) * 1.2
            or "dpo" in example
            or "custom" in example
        )
        assert float(last) < float(first)
    assert all(word in out for word in shown)


def test_custom_loss_is_that_of_all_logits(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = run("custom_loss", monkeypatch, capsys, *TINY)
    fused, whole = re.findall(r"from hidden states (\S+), from all logits (\S+)", out)[0]
    assert fused == whole


def in_two_processes(example: str) -> subprocess.CompletedProcess[str]:
    launch = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        "2",
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [*launch, "-m", f"examples.{example}", *TINY]
    return subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )


def test_fsdp2() -> None:
    from tests.transformers.ranks import HAS_FSDP2_ON_CPU

    if not HAS_FSDP2_ON_CPU:
        pytest.skip(f"torch {torch.__version__} has no FSDP2 on CPUs")
    done = in_two_processes("fsdp2")
    assert done.returncode == 0, done.stderr
    [(first, last)] = LINE.findall(done.stdout)  # of one rank
    assert float(last) < float(first)
    assert "fused linear cross entropy" in done.stdout


@pytest.mark.parametrize(
    ("example", "package"),
    [("hf_trainer --sharding zero3", "deepspeed"), ("lightning_module", "lightning")],
)
def test_what_is_not_installed_is_named(
    example: str, package: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name, *a: None if name == package else find_spec(name, *a),
    )
    with pytest.raises(SystemExit, match=f"pip install {package}"):
        run(example, monkeypatch, capsys)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_gpu(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        run("moe", monkeypatch, capsys, "--device", "cuda")
    assert "sees no GPU" in capsys.readouterr().err


def test_the_readme_lists_every_example() -> None:
    listed = set(re.findall(r"-m examples\.(\w+)", (ROOT / "examples" / "README.md").read_text()))
    files = {path.stem for path in (ROOT / "examples").glob("*.py")} - {"common"}
    assert listed - {"demo"} == files
    tested = {example.split()[0] for example in EXAMPLES}
    assert files == tested | {"fsdp2"}
