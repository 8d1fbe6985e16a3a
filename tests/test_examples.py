"""Every example, at a tiny size, in this process; those that take several processes start them."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
TINY = ("--steps", "4", "--batch", "2", "--seq", "32")
#: packages that would change what other tests see, were they where all can import them
APART = Path(os.environ.get("FRAMEWORK_WHEELS") or Path(sys.prefix) / "frameworks")

pytest.importorskip("transformers")
pytestmark = pytest.mark.usefixtures("quiet_on_one_thread")

#: example and arguments -> what must be installed; what the report shows
EXAMPLES: dict[str, tuple[str, tuple[str, ...]]] = {
    "hf_trainer": ("accelerate", ("LigerRMSNorm",)),
    "trl_trainers --trainer sft": ("trl", ("LigerSwiGLU",)),
    "trl_trainers --trainer dpo": ("trl", ("LigerSwiGLU",)),
    "trl_trainers --trainer grpo": ("trl", ("LigerSwiGLU",)),
    "plain_pytorch": ("torch", ()),
    "finetuning.lora --pretraining 0": ("peft", ("fused linear cross entropy", "LoRA in one node")),
    "finetuning.lora --pretraining 1 --trainer trl": ("trl", ("LigerSwiGLU", "LoRA in one node")),
    "finetuning.qlora --pretraining 0": (
        "bitsandbytes",
        ("fused linear cross entropy",),
    ),
    "moe": ("torch", ("fused linear cross entropy", "experts")),
    "vision_language": ("torch", ("fused linear cross entropy", "LigerLayerNorm")),
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


SMALL = (
    *("--steps", "3", "--pretraining", "2", "--batch", "8", "--seq", "16"),
    *("--vocabulary", "400", "--text", "src/liger_kernel/megatron"),
)


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("alignment")


@pytest.mark.parametrize("name", ["orpo", "dpo", "grpo", "distillation"])
def test_alignment(
    name: str, output: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It ends well only where the losses of both runs agree."""
    pytest.importorskip("matplotlib")
    out = run(f"alignment.{name}", monkeypatch, capsys, *SMALL, "--output", str(output))
    assert "LigerSwiGLU" in out
    assert "| accuracy, mean of the last 5 steps |" in out
    found = json.loads((output / f"{name}-cpu.json").read_text())
    assert found["stock"]["accuracies"][0] == found["patched"]["accuracies"][0]
    assert (output / f"{name}-cpu.png").read_bytes().startswith(b"\x89PNG")


def test_the_policy_loss_beside_all_logits() -> None:
    """The runs of GRPO sample each for itself: their losses are compared here, on the same samples."""
    from examples.alignment.grpo import GRPO, Samples
    from examples.common import causal_lm
    from examples.demo.report import losses_agree

    example = GRPO.__new__(GRPO)
    example.model = causal_lm().train()
    ids = torch.randint(257, (4, 12))
    mask = (torch.arange(6) < torch.tensor([[6], [1], [4], [2]])).float()
    samples = Samples(ids, mask, torch.rand(4), torch.tensor([1.5, -0.5, 0.25, -1.0]))
    results: Any = {mode: {"losses": []} for mode in ("stock", "patched")}
    for mode, found in results.items():
        loss, _ = getattr(example, mode)(samples)
        example.model.zero_grad()
        loss.backward()
        norms = [p.grad.norm() for p in example.model.parameters() if p.grad is not None]
        found["losses"] = [float(loss.detach()), *map(float, norms)]
    assert losses_agree(results, "float32")
    assert len(results["stock"]["losses"]) > 10


@pytest.mark.parametrize(
    ("line", "closed"),
    [
        ("f(x)", True),
        ("f(x", False),
        ("x)", False),
        ("f[(x])", False),
        ("{f[(x)]}", True),
        ("", True),
    ],
)
def test_the_reward(line: str, closed: bool) -> None:
    pytest.importorskip("tokenizers")
    from examples.alignment.grpo import is_closed

    assert is_closed(line) == closed


TWO_PROCESSES = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")


def started(example: str, *launcher: str) -> subprocess.CompletedProcess[str]:
    """In a process of its own, or several, which also see the packages that stand apart."""
    path = os.pathsep.join(filter(None, [os.environ.get("PYTHONPATH"), str(APART)]))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    command = [sys.executable, *launcher, "-m", *f"examples.{example}".split(), *TINY]
    return subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )


def test_fsdp2() -> None:
    from tests.transformers.ranks import LACKS_FSDP2

    if LACKS_FSDP2:
        pytest.skip(f"torch {torch.__version__} has no FSDP2 on CPUs")
    done = started("fsdp2", *TWO_PROCESSES)
    assert done.returncode == 0, done.stderr
    [(first, last)] = LINE.findall(done.stdout)  # of one rank
    assert float(last) < float(first)
    assert "fused linear cross entropy" in done.stdout


@pytest.mark.parametrize(
    ("example", "package", "launcher"),
    [
        ("lightning_module", "lightning", ()),
        ("hf_trainer --sharding zero3", "deepspeed", TWO_PROCESSES),
    ],
)
def test_packages_apart(example: str, package: str, launcher: tuple[str, ...]) -> None:
    if not (APART / package).is_dir():
        pytest.skip(f"no {APART / package}, where make test puts it")
    done = started(example, *launcher)
    assert done.returncode == 0, done.stderr
    [(first, last)] = LINE.findall(done.stdout)
    assert float(last) < float(first)
    assert "LigerRMSNorm" in done.stdout


@pytest.mark.parametrize(
    ("example", "package"),
    [
        ("hf_trainer --sharding zero3", "deepspeed"),
        ("lightning_module", "lightning"),
        ("finetuning.qlora", "bitsandbytes"),
    ],
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
@pytest.mark.parametrize("flags", ["moe --device cuda", "alignment.dpo --gpu-shape"])
def test_no_gpu(
    flags: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        run(flags, monkeypatch, capsys)
    error = capsys.readouterr().err
    assert "sees no GPU" in error
    assert flags.partition(" ")[2] in error


def test_a_folder_without_text(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    with pytest.raises(SystemExit, match=f"No text found: {tmp_path} holds 0 .py files"):
        run(f"alignment.dpo --text {tmp_path} --output {tmp_path}", monkeypatch, capsys)


@pytest.mark.parametrize("flags", ["--batch 0", "--steps -1", "--seq 1"])
def test_sizes_that_train_nothing(
    flags: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        run(f"moe {flags}", monkeypatch, capsys)
    assert flags in capsys.readouterr().err


@pytest.mark.parametrize("example", ["moe", "finetuning.lora", "alignment.dpo"])
def test_rows_that_are_longer_than_the_text(
    example: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    if example == "finetuning.lora":
        pytest.importorskip("peft")
    more = ("--output", str(tmp_path)) if example.startswith("alignment") else ()
    with pytest.raises(SystemExit, match="--seq 99999999 is more than the text has: "):
        run(f"{example} --seq 99999999", monkeypatch, capsys, *more)


def test_the_readme_lists_every_example() -> None:
    folder = ROOT / "examples"
    listed = set(re.findall(r"-m examples\.([\w.]+)", (folder / "README.md").read_text()))
    files = {
        ".".join(path.relative_to(folder).with_suffix("").parts)
        for path in folder.rglob("*.py")
        if '__name__ == "__main__"' in path.read_text() and "demo" not in path.parts
    }
    assert listed - {"demo"} == files
    tested = {example.split()[0] for example in EXAMPLES}
    apart = {"fsdp2", "lightning_module"}
    assert {name for name in files if not name.startswith("alignment.")} == tested | apart
