"""The demo: its pieces, what it says when something is missing, and one tiny run from end to end."""

from __future__ import annotations

import dataclasses
import io
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tqdm import tqdm

pytest.importorskip("tokenizers")
pytest.importorskip("transformers")

from benchmark.shapes import DEMO, MODELS
from examples.demo import __main__ as demo
from examples.demo import report, text
from examples.demo.train import Blocks, PeakMemory, Run


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a little more text than the demo insists on, and some that it must leave out."""
    folder = tmp_path_factory.mktemp("library")
    words = " ".join(f"name_{i * i % 997}" for i in range(20_000))
    for i in range(2 + text.MIN_TEXT_BYTES // len(words)):
        (folder / f"module_{i}.py").write_text(f"# {i}\n{words}\n", encoding="utf-8")
    (folder / "site-packages").mkdir()
    (folder / "site-packages" / "theirs.py").write_text("theirs = 1\n")
    return folder


def results(stock: list[float], patched: list[float]) -> report.Results:
    def one(losses: list[float], speed: float, peak: float) -> dict[str, Any]:
        return {
            "losses": losses,
            "tokens_per_second": speed,
            "seconds_per_step": 100 / speed,
            "turns": [90 / speed, 100 / speed, 120 / speed],
            "memory_at_rest": 1e9,
            "memory_peak": peak,
            "parameters": 11_000_000,
            "machine": "a machine",
        }

    return {"stock": one(stock, 100.0, 5e9), "patched": one(patched, 150.0, 2e9)}


# --- text --------------------------------------------------------------------------------------


def test_text_of_the_standard_library() -> None:
    names = {path.name for path in text.find_text()}
    assert {"argparse.py", "dataclasses.py"} <= names


def test_other_packages_are_left_out(library: Path) -> None:
    files = text.find_text(library)
    assert files == sorted(files)
    assert "theirs.py" not in {path.name for path in files}


def test_tokens_decode_to_the_text(library: Path, tmp_path: Path) -> None:
    from tokenizers import Tokenizer

    files = text.find_text(library)[:2]
    tokens = text.tokenize(files, 300, tmp_path / "tokenizer.json")
    tokenizer = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert tokenizer.get_vocab_size() == 300
    assert int(tokens.max()) < 300
    decoded = tokenizer.decode(tokens.tolist(), skip_special_tokens=False)
    assert decoded == "".join(file.read_text() + text.END_OF_FILE for file in files)


def test_the_second_preparation_reads_the_first(
    library: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = text.prepare(tmp_path, 300, library)
    monkeypatch.setattr(text, "tokenize", lambda *_: pytest.fail("not taken from the cache"))
    assert text.prepare(tmp_path, 300, library) == first
    with pytest.raises(pytest.fail.Exception):
        text.prepare(tmp_path, 301, library)


def test_blocks_are_consecutive_and_start_over() -> None:
    blocks = Blocks(torch.arange(10, dtype=torch.int32), seq=4, samples=3)
    assert len(blocks) == 3
    assert [blocks[i]["input_ids"].tolist() for i in range(3)] == [
        [0, 1, 2, 3],
        [4, 5, 6, 7],
        [0, 1, 2, 3],
    ]
    assert blocks[0]["labels"].dtype == torch.int64


# --- measuring and reporting ---------------------------------------------------------------------


def test_peak_memory_sees_what_was_freed_again() -> None:
    import time

    with PeakMemory("cpu") as memory:
        big = torch.ones(64 * 1024 * 1024)  # 256 MiB
        time.sleep(0.1)
        del big
    assert 200e6 < memory.peak - memory.at_rest < 600e6


def test_the_tables() -> None:
    both = results([10.0, 8.0], [10.0, 8.0 + 8e-6])
    assert report.relative_differences(both) == pytest.approx([0.0, 1e-6])
    assert report.loss_table(both).splitlines()[2].split() == [
        "2",
        "8.000000000",
        "8.000008000",
        "1.0e-06",
    ]
    table = report.markdown("a shape", both)
    assert "| tokens/s | 100 | 150 | 1.50x |" in table
    assert "| peak memory above the model at rest | 4.00 GB | 1.00 GB | 0.25x |" in table
    assert "max. rel. difference 1.0e-06" in table
    both["patched"]["turns"] = [0.5, 0.8, 0.6]  # beside 0.9, 1.0 and 1.2
    spread = "| speed, min / median / max of 3 turns | | | 1.25x / 1.80x / 2.00x |"
    assert spread in report.markdown("a shape", both)
    assert not report.undecided(both)
    both["patched"]["turns"][0] = 0.91
    assert report.undecided(both)
    alone = {"stock": both["stock"]}
    assert "| tokens/s | 100 |" in report.markdown("a shape", alone)
    assert "rel. difference" not in report.loss_table(alone)
    assert "turns" not in report.markdown("a shape", alone)


def test_what_of_a_turn_is_timed() -> None:
    def turns(*arguments: str, device: str = "cpu") -> list[tuple[int, int]]:
        run = demo.plan(demo.parse(["--device", "cpu", *arguments]))
        return dataclasses.replace(run, device=device).turns()

    assert turns("--steps", "3") == [(1, 1), (1, 2), (2, 3)]
    assert turns("--steps", "5", "--turn", "2", "--warmup", "0") == [(0, 2), (2, 4), (4, 5)]
    on_gpu = turns("--steps", "12", "--turn", "5", "--warmup", "3", device="cuda")
    assert on_gpu == [(3, 5), (6, 10), (11, 12)]


def test_the_runs_take_turns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[str, str]] = []

    def rows(_: Any, run: Run, log: Path) -> Iterator[dict[str, Any]]:
        for message in ({"stage": "first"}, {"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.0}):
            seen.append((run.mode, *list(message)[:1]))
            yield message
        yield {"result": {"of": run.mode}}

    monkeypatch.setattr(demo.children, "rows", rows)
    run = demo.plan(demo.parse(["--device", "cpu"]))
    runs = [run, dataclasses.replace(run, mode="patched")]
    bar = tqdm(total=4, file=io.StringIO())
    found = demo.train_in_turns(runs, bar, dict.fromkeys(("stock", "patched"), tmp_path / "log"))
    assert found == {"stock": {"of": "stock"}, "patched": {"of": "patched"}}
    turn = [("stock", "step"), ("patched", "step")]
    assert seen == [("stock", "stage"), turn[0], ("patched", "stage"), turn[1], *turn]
    assert bar.n == 4


def test_losses_that_differ_are_an_error() -> None:
    assert report.losses_agree(results([10.0, 8.0], [10.0, 8.0001]), "float32")
    assert not report.losses_agree(results([10.0, 8.0], [10.0, 8.01]), "float32")
    assert not report.losses_agree(results([10.0, 8.0], [10.0, math.nan]), "float32")


@pytest.mark.parametrize("modes", [("stock", "patched"), ("patched",)], ids=len)
def test_plot(modes: tuple[str, ...], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    both = results([10.0, 8.0], [10.0, 8.0])
    report.plot("a title", {mode: both[mode] for mode in modes}, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


# --- errors --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--shape", "huge"], "Unknown shape 'huge'; known: tiny, llama-3.2-1b"),
        (["--steps", "2", "--warmup", "2"], "nothing to time"),
        (["--vocabulary", "32001"], "does not fit tiny"),
        (["--vocabulary", "256"], "--vocabulary 256 is below 257"),
        (["--batch", "0"], "--batch 0"),
        (["--text", "{empty}"], "No text found"),
    ],
)
def test_clear_errors(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [a.replace("{empty}", str(tmp_path)) for a in arguments]
    assert demo.main([*arguments, "--output", str(tmp_path / "out"), "--device", "cpu"]) == 2
    error = capsys.readouterr().err
    assert "error: " in error
    assert message in error
    assert "Traceback" not in error


def test_an_output_that_cannot_be_made(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()
    output = tmp_path / "file" / "out"
    assert demo.main(["--output", str(output), "--device", "cpu"]) == 2
    assert f"{output} cannot be made" in capsys.readouterr().err


def test_a_full_disk_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(text.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 5_000_000}))
    assert demo.main(["--output", str(tmp_path), "--device", "cpu"]) == 2
    assert "5 MB free" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_gpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert demo.main(["--device", "cuda", "--output", str(tmp_path)]) == 2
    assert "sees no GPU" in capsys.readouterr().err


def test_a_text_shorter_than_a_sequence(
    library: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--device", "cpu", "--vocabulary", "300", "--text", str(library)]
    assert demo.main([*arguments, "--output", str(tmp_path), "--seq", str(10**8)]) == 2
    assert "tokens only" in capsys.readouterr().err


def test_a_failing_run_shows_its_log(tmp_path: Path) -> None:
    run = dataclasses.replace(demo.plan(demo.parse(["--device", "cpu"])), shape="gone")
    message = r"(?s)stock run failed: its process ended with code 1.*KeyError: 'gone'"
    with pytest.raises(RuntimeError, match=message):
        demo.train_in_turns([run], tqdm(disable=True), {"stock": tmp_path / "log"})


# --- shapes, and all of it -----------------------------------------------------------------------


@pytest.mark.parametrize("name", DEMO)
def test_shapes_are_models(name: str) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(**MODELS[name])
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert {key: getattr(config, key) for key in MODELS[name]} == MODELS[name]
    assert sum(p.numel() for p in model.parameters()) > 10e6


def test_end_to_end(library: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--device", "cpu", "--seq", "16", "--batch", "2", "--steps", "3"]
    arguments += ["--vocabulary", "300", "--text", str(library), "--output", str(tmp_path)]
    assert demo.main(arguments) == 0, capsys.readouterr().err
    shown = capsys.readouterr().out
    assert "| tokens/s |" in shown
    assert "LlamaForCausalLM: " in shown
    data = json.loads((tmp_path / "tiny-cpu.json").read_text())
    assert Run(**data["run"]).steps == 3
    stock, patched = (data["results"][mode] for mode in ("stock", "patched"))
    assert len(stock["losses"]) == len(patched["losses"]) == 3
    assert len(stock["turns"]) == len(patched["turns"]) == 2
    assert "| speed, min / median / max of 2 turns |" in shown
    assert stock["losses"][0] == pytest.approx(math.log(32_000), rel=0.05)
    assert patched["patch_report"]
    assert (tmp_path / "tiny-cpu.png").exists()
