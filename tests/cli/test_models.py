"""`inspect` and `estimate`: models on paper."""

from __future__ import annotations

import json
import socket
from pathlib import Path
from typing import Any

import pytest
import torch

import liger_kernel
from benchmark.shapes import MODELS, STEPS
from liger_kernel import backends
from liger_kernel.backends import nvidia
from liger_kernel.cli import checks, estimate, inspection, models, paper
from liger_kernel.cli.paper import LiveBytes
from liger_kernel.cli.slow_paths import slow_paths
from tests.cli.conftest import Run
from tests.transformers.here import stock_can
from tests.transformers.tiny import batch, build

RESULTS = Path(__file__).parents[2] / "benchmark" / "results" / "nvidia-h100-80gb-hbm3.json"


def peaks(setup: Any) -> dict[str, float]:
    """Of stock and patched, where both have been measured."""
    found = {
        row["mode"]: row["peak_gb"]
        for row in json.loads(RESULTS.read_text())["e2e"]
        if (row["shape"], row["seq"], row["batch"], row["rank"]) == (*setup[:3], 0)
    }
    return found if {"stock", "patched"} <= found.keys() else {}


MEASURED = {setup: found for setup in STEPS if not setup.rank and (found := peaks(setup))}


def off_by(found: float, truth: float) -> float:
    return abs(found / truth - 1)


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """A folder with the configuration of a large model."""
    settings: Any = build("llama").config.to_dict()  # type: ignore[operator]
    settings |= {"hidden_size": 4096, "num_hidden_layers": 3, "vocab_size": 128256}
    (tmp_path / "config.json").write_text(json.dumps(settings))
    return tmp_path


class TestInspect:
    def test_a_folder_a_file_and_a_type(self, run: Run, both: str, config: Path) -> None:
        found = [run("inspect", str(where), "--json") for where in (config, config / "config.json")]
        assert found[0].data == found[1].data
        (loss, *_), kinds = found[0].data["rows"], [row["kind"] for row in found[0].data["rows"]]
        assert loss["by"] == "fused linear cross entropy"
        assert kinds.count("mlp") == 3
        assert found[0].data["step"] == "ran"
        done = run("inspect", "qwen3")
        assert done.status == 0
        assert "LigerSwiGLU" in done.out
        assert all(len(line) <= 80 for line in done.out.splitlines())

    def test_a_model_in_the_cache_of_the_hub(
        self, run: Run, config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        constants = pytest.importorskip("huggingface_hub.constants")
        repository = tmp_path / "cache" / "models--some--thing"
        for folder in ("refs", "snapshots/abc"):
            (repository / folder).mkdir(parents=True)
        (repository / "refs" / "main").write_text("abc")
        (config / "config.json").rename(repository / "snapshots" / "abc" / "config.json")
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        copied = "transformers.utils.hub.TRANSFORMERS_CACHE"  # by releases before 5, on import
        monkeypatch.setattr(copied, str(tmp_path / "cache"), raising=False)
        assert run("inspect", "some/thing", "--json").data["model"] == "LlamaForCausalLM"

    def test_what_is_skipped_and_what_is_slow(self, run: Run, both: str) -> None:
        assert "eager" in run("inspect", "gpt_oss").out  # its attention; 36 layers
        done = run("inspect", "jetmoe")
        assert "not run by transformers' experts registry" in " ".join(done.out.split())
        assert any("mamba" in line for line in run("inspect", "mamba2", "--json").data["slow"])
        assert run("inspect", "llama", "--json").data["slow"] == []

    def test_a_step_tells_more_than_the_structure(self, monkeypatch: pytest.MonkeyPatch) -> None:
        model = models.on_paper("llama")
        report = liger_kernel.patch(model)
        assert report.rows[0].by
        monkeypatch.setattr(
            type(model), "loss_function", lambda self, logits, **_: logits[..., ::2].sum()
        )
        assert inspection.one_step(model) is None
        assert report.rows[0].by is None

    @pytest.mark.parametrize(
        ("name", "cls"),
        [
            ("bert", "BertForMaskedLM"),
            ("bart", "BartForConditionalGeneration"),
            ("t5", "T5ForConditionalGeneration"),
        ],
    )
    def test_the_class_that_people_train(self, run: Run, name: str, cls: str) -> None:
        found = run("inspect", name, "--json").data
        assert (found["model"], found["step"]) == (cls, "ran")
        done = run("estimate", name, "--seq", "16", "--json")
        assert done.data["setup"].startswith(cls)

    def test_what_older_releases_want_to_know(self) -> None:
        """Transformers 4.57 turns autocast off on every device, and looks for padding by `torch.all`."""
        nothing, ones = torch.empty(2, 3, device="meta"), torch.ones(2, 3)
        with models.runnable():
            with torch.autocast("meta", enabled=False):
                assert torch.all(nothing == 1)
            assert torch.all(nothing, 1).shape == (2,)
            with torch.autocast("cpu", torch.bfloat16):
                assert torch.mm(ones, ones.t()).dtype == torch.bfloat16
            assert not torch.all(ones == 0)

    def test_a_request_by_name_changes_nothing(self, run: Run) -> None:
        """Nobody computes on the meta device, whoever was asked for."""
        with backends.use_implementation("triton"):
            found = [run("inspect", "qwen3", "--json").data]
            assert "computed by" not in run("inspect", "qwen3").out
        found.append(run("inspect", "qwen3", "--json").data)
        assert found[0] == found[1]
        assert found[0]["step"] == "ran"

    def test_a_forward_that_cannot_run_is_told(self, run: Run) -> None:
        done = run("inspect", "blip")
        assert done.status == 0
        assert "pixel_values" in done.out


class TestBadInput:
    @pytest.mark.parametrize("command", ["inspect", "estimate"])
    @pytest.mark.parametrize("text", [None, "{", "{}", '{"model_type": "nobody"}', "[1]"])
    def test_models(self, run: Run, tmp_path: Path, command: str, text: str | None) -> None:
        where = tmp_path / "config.json"
        if text is not None:
            where.write_text(text)
        done = run(command, str(where))
        assert (done.status, done.out, done.err.count("\n")) == (2, "", 1)
        assert str(where) in done.err

    @pytest.mark.parametrize("command", ["inspect", "estimate", "doctor"])
    @pytest.mark.parametrize(
        ("name", "says"), [("", "''"), (" ", "' '"), ("a" * 300, "aaa...: File name too long")]
    )
    def test_what_is_no_name(self, run: Run, command: str, name: str, says: str) -> None:
        done = run(command, name)
        assert (done.status, done.out, done.err.count("\n")) == (2, "", 1)
        assert says in done.err

    def test_a_folder_without_a_configuration(
        self, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """It is named; but one that has the name of a type, by chance, hides no type."""
        done = run("inspect", str(tmp_path))
        assert (done.status, done.err.count("\n")) == (2, 1)
        assert f"{tmp_path}: there is no config.json" in done.err
        (tmp_path / "llama").mkdir()
        monkeypatch.chdir(tmp_path)
        assert run("inspect", "llama", "--json").data["model"] == "LlamaForCausalLM"

    @pytest.mark.parametrize("named", [[5], ["Trainer"], ["AutoModel"], "LlamaModel"], ids=str)
    def test_architectures_that_are_none(self, run: Run, config: Path, named: Any) -> None:
        settings = json.loads((config / "config.json").read_text())
        (config / "config.json").write_text(json.dumps({**settings, "architectures": named}))
        assert run("inspect", str(config), "--json").data["model"] == "LlamaForCausalLM"

    @pytest.mark.parametrize(("name", "rank"), [("mamba", 8), ("llama", 10**30)])
    def test_adapters_that_cannot_be(self, run: Run, name: str, rank: int) -> None:
        pytest.importorskip("peft")
        done = run("estimate", name, "--lora", str(rank))
        assert (done.status, done.out, done.err.count("\n")) == (2, "", 1)
        assert f"--lora {rank}: " in done.err
        assert len(done.err) < 600  # no stack of C++

    def test_what_transformers_stumbles_over(
        self, run: Run, config: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def stumble(*_: Any, **__: Any) -> Any:
            raise TypeError("list indices")

        monkeypatch.setattr(models._transformers().AutoConfig, "from_pretrained", stumble)
        done = run("inspect", str(config))
        assert (done.status, done.err.count("\n")) == (2, 1)
        assert "TypeError: list indices" in done.err

    def test_code_of_a_repository_is_not_run(
        self, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Nor is an option recommended that no command has. One in the cache is no folder here."""
        remote = {"model_type": "theirs", "auto_map": {"AutoConfig": "theirs.Config"}}
        (tmp_path / "config.json").write_text(json.dumps(remote))
        done = run("inspect", str(tmp_path))
        assert (done.status, done.err.count("\n")) == (2, 1)
        assert "code of its own" in done.err
        assert "trust_remote_code" not in done.err
        refused = ValueError("pass the argument `trust_remote_code=True`")
        auto = models._transformers().AutoConfig
        monkeypatch.setattr(
            auto, "from_pretrained", lambda *_, **__: (_ for _ in ()).throw(refused)
        )
        assert "code of its own" in run("inspect", "somebody/something").err

    def test_a_type_without_defaults(self, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
        """As `vision-encoder-decoder` was before transformers 5.24."""

        def refuse(*_: Any, **__: Any) -> Any:
            raise ValueError("its parts are needed")

        monkeypatch.setattr(models._transformers().AutoConfig, "for_model", refuse)
        done = run("inspect", "vision-encoder-decoder")
        assert "no defaults: its parts are needed" in done.err
        assert (done.status, done.err.count("\n")) == (2, 1)

    def test_a_configuration_that_fits_no_model(self, run: Run, config: Path) -> None:
        file = config / "config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), "hidden_size": "wide"}))
        done = run("inspect", str(config))
        assert (done.status, done.err.count("\n")) == (2, 1)

    @pytest.mark.parametrize(
        "options",
        [
            ("--batch", "-1"), ("--batch", "0"), ("--seq", "0"), ("--seq", "x"), ("--lora", "-3"),
            ("--dtype", "int4"), ("--optimizer", "lion"), ("--memory", "-1"), ("--quantised", "nf4"),
            ("--quantised", "int2"), ("--seq", "100000000"),
        ],
    )  # fmt: skip
    def test_sizes(self, run: Run, both: str, options: tuple[str, str]) -> None:
        done = run("estimate", "llama", *options)
        assert (done.status, done.out, done.err.count("\n")) == (2, "", 1)
        assert options[0] in done.err

    def test_activations_that_cannot_be_counted(
        self, run: Run, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """As those of `aria_text` were, whose experts read numbers of tokens, before transformers 5.24."""

        def needs_numbers(*_: Any) -> Any:
            raise RuntimeError("Cannot copy out of meta tensor; no data!")

        monkeypatch.setattr(paper, "step", needs_numbers)
        done = run("estimate", "llama")
        assert "no data!" in done.err
        assert (done.status, done.err.count("\n")) == (2, 1)
        assert "activations" in done.err

    def test_more_tokens_than_the_model_takes(self, run: Run) -> None:
        done = run("estimate", "bert", "--seq", "513")
        assert (done.status, done.err.count("\n")) == (2, 1)
        assert "512 tokens at most; --seq 513" in done.err

    def test_why_the_hub_gives_nothing(self, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
        def refuse(*_: Any, **__: Any) -> Any:
            raise OSError("this repository is\ngated; log in")

        monkeypatch.setattr(models._transformers().AutoConfig, "from_pretrained", refuse)
        done = run("inspect", "some/thing", "--download")
        assert (done.status, done.err.count("\n")) == (2, 1)
        assert "some/thing" in done.err
        assert "from the hub: this repository is gated; log in" in done.err
        assert "--download" not in done.err

    def test_nothing_is_downloaded(self, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
        def refuse(*args: Any) -> Any:
            raise AssertionError("a connection")

        monkeypatch.setattr(socket.socket, "connect", refuse)
        done = run("inspect", "somebody/something")
        assert done.status == 2
        assert "--download" in done.err


class TestEstimate:
    def test_the_parts(self, run: Run, both: str, config: Path) -> None:
        arguments = ("estimate", str(config), "--batch", "2", "--seq", "1024")
        done = run(*arguments)
        assert done.status == 0
        assert "logits and loss" in done.out
        stock, ours = (run(*arguments, "--json").data[name] for name in ("stock", "patched"))
        assert stock["optimizer"] == 2 * stock["gradients"] == 2 * ours["gradients"]
        assert ours["activations"] < stock["activations"]
        assert ours["logits_and_loss"] < stock["logits_and_loss"] / 2
        for found in (stock, ours):
            fixed = found["weights"] + found["optimizer"]
            assert max(found["activations"], found["gradients"]) < found["peak"] - fixed
            at_most = found["activations"] + found["logits_and_loss"] + found["gradients"]
            assert found["peak"] - fixed <= at_most

    def test_a_peak_that_tokens_do_not_make(self, run: Run, config: Path) -> None:
        done = run("estimate", str(config), "--seq", "16")
        assert "0 bytes less" in done.out
        assert "in the optimizer's step" in done.out

    def test_options(self, run: Run, config: Path) -> None:
        def peak(*options: str) -> dict[str, int]:
            done = run("estimate", str(config), "--seq", "4096", "--json", *options)
            found: dict[str, int] = done.data["patched"]
            return found

        plain = peak()
        assert peak("--optimizer", "sgd")["optimizer"] == 0
        assert peak("--optimizer", "adamw_8bit")["optimizer"] < 0.6 * plain["optimizer"]
        wide = peak("--dtype", "float32")  # a few buffers are float32 always
        assert 1.99 * plain["weights"] < wide["weights"] <= 2 * plain["weights"]
        checkpointed = peak("--checkpointing")
        assert checkpointed["activations"] < plain["activations"] / 2
        pytest.importorskip("peft")
        lora = peak("--lora", "8")
        assert lora["gradients"] < plain["gradients"] / 50
        assert lora["activations"] < plain["activations"]
        longer = peak("--lora", "8", "--long-context")
        assert longer["activations"] < checkpointed["activations"] / 2
        small = peak("--lora", "8", "--long-context", "--quantised", "nf4")
        assert small["weights"] < longer["weights"]

    def test_the_longest_sequence(self, run: Run, tmp_path: Path) -> None:
        """Longer with the library, and longest with its options for that; the line meets the memory."""
        pytest.importorskip("peft")
        settings = {**MODELS["llama-3-8b-4-layers"], "num_hidden_layers": 3, "vocab_size": 8000}
        settings |= {"hidden_size": 1024, "intermediate_size": 3584, "num_attention_heads": 8}
        (tmp_path / "config.json").write_text(json.dumps(settings))
        arguments = ("estimate", str(tmp_path), "--lora", "8", "--checkpointing", "--json")
        plain = run(*arguments, "--memory", "4").data["longest"]
        long = run(*arguments, "--memory", "4", "--long-context").data["longest"]["patched"]
        assert plain["stock"] < plain["patched"] < long / 1.5
        there = run(*arguments, "--long-context", "--seq", str(long)).data["patched"]["peak"]
        assert off_by(there, 4e9 - 2**30) < 0.01

    @pytest.mark.parametrize("batch", [1, 2**16, 2**24])
    def test_no_more_tokens_are_tried_than_may_be_asked_for(
        self, batch: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Of a batch, or a memory, so large that paper would take hours."""
        tried = []

        def measured(model: Any, batch: int, seq: int, setup: Any) -> Any:
            tried.append(batch * seq)
            return estimate.Step(peak=batch * seq)

        monkeypatch.setattr(estimate, "measured", measured)
        found = estimate._longest(None, batch, estimate.Setup("adamw", False), 10**15)
        assert max(tried, default=0) <= estimate.MOST_TOKENS
        assert bool(found) == bool(tried) == (batch < 2**24)

    @pytest.mark.parametrize("checkpointing", [False, True])
    def test_what_a_step_takes(self, checkpointing: bool) -> None:
        """Counted on paper, and of a real step on the CPU, where the mask and the tables are beside it."""

        def built() -> Any:
            model: Any = build("llama", hidden_size=1024, head_dim=16).train()
            if checkpointing:
                model.gradient_checkpointing_enable({"use_reentrant": False})
            return model

        model, ids = built(), batch(2, 32)["input_ids"]
        live = LiveBytes(model)
        with live:
            outputs = model(input_ids=ids, use_cache=False)
            alive = live.live - outputs.logits.nbytes
        del outputs
        live = LiveBytes(model)
        with live:
            model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        found = paper.step(built().to("meta"), 2, 32)
        assert off_by(found[0], alive) < 0.02
        assert off_by(found[1], live.peak) < 0.02

    def test_six_set_ups_are_measured(self) -> None:
        assert len(MEASURED) >= 6

    @pytest.mark.parametrize("setup", MEASURED, ids=str)
    def test_against_measured_peaks(self, run: Run, tmp_path: Path, setup: Any) -> None:
        """Those of `python -m benchmark e2e` on an H100, fused AdamW, in the file of results."""
        settings = {**MODELS[setup.shape], "max_position_embeddings": setup.seq}
        (tmp_path / "config.json").write_text(json.dumps(settings))
        options = ("--checkpointing",) if setup.checkpointing else ()
        sizes = ("--batch", str(setup.batch), "--seq", str(setup.seq))
        made = models.on_paper(str(tmp_path))
        stock_can("step without numbers", lambda: paper.step(made, 1, 8))
        found = run("estimate", str(tmp_path), *sizes, *options, "--json").data
        # the torch of the file had products into fp32, and took no memory for making them otherwise
        modes = ["stock", "patched"] if nvidia.MIXED_PRODUCTS else ["stock"]
        # of short inputs the workspace of cuBLAS is a part; gpt-oss, the one with eager attention, took 1.1 GB more on
        # the GPU than on paper, and why is not known
        most = 0.04 if "gpt-oss" in setup.shape else 0.02 if setup.seq == 512 else 0.01
        for mode in modes:
            assert off_by(found[mode]["peak"] / 1e9, MEASURED[setup][mode]) < most, mode


@pytest.mark.parametrize("command", ["inspect", "estimate"])
def test_what_the_page_shows(
    command: str, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every line of the answer that `docs/command-line.md` has, whatever rich draws between them."""
    transformers = models._transformers()
    if not transformers.__version__.startswith(checks.NEWEST["transformers"]):
        pytest.skip("the page was written with the newest transformers that was tested")
    if command == "estimate" and (torch.cuda.is_available() or not nvidia.MIXED_PRODUCTS):
        pytest.skip("the page was written on a machine without a GPU, with a newer torch")
    monkeypatch.setenv("COLUMNS", "160")
    monkeypatch.chdir(tmp_path)
    Path("llama-3.2-1b").mkdir()
    Path("llama-3.2-1b", "config.json").write_text(json.dumps(MODELS["llama-3.2-1b"]))
    page = (RESULTS.parents[2] / "docs" / "command-line.md").read_text()
    _, _, block = page.partition(f"$ liger_kernel {command} ")
    given, *lines = block.partition("\n```")[0].splitlines()
    said = [" ".join(line.split()) for line in run(command, *given.split()).out.splitlines()]
    shown = [" ".join(line.split()) for line in lines if "not installed" not in line]
    assert [line for line in shown if line not in said] == []


def test_slow_paths_of_a_live_model() -> None:
    model = build("llama")
    (line,) = slow_paths(model)
    assert "sdpa" in line
    assert next(model.parameters()).device == torch.device("cpu")
