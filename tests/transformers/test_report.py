"""`PatchReport.savings`: the formula against the bytes that live in a step, and what it depends on."""

from __future__ import annotations

import copy
import io
import json
import pickle
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

import liger_kernel
from benchmark import savings as benchmark
from liger_kernel.backends import use_implementation
from liger_kernel.transformers.patching import PatchOptions, PatchReport
from liger_kernel.transformers.patching.savings import LossSite
from tests.transformers.tiny import VOCAB, batch, build

MIB = 2**20
ON_CPU = [case.tiny() for case in benchmark.SAVINGS if not case.autocast]
FROZEN_BODY = next(case for case in ON_CPU if case.frozen == "body")


@pytest.mark.parametrize("case", ON_CPU, ids=lambda case: case.name)
def test_predicts_what_a_step_needs_less(case: benchmark.Saving) -> None:
    with use_implementation("triton"):  # the plain path makes copies that kernels do not
        row = benchmark.measure(case, "cpu")
    assert abs(row["ratio"] - 1) < benchmark.OFF, row


@pytest.mark.parametrize("options", [{"chunk_size": 32}, {"memory_budget": 400_000}], ids=str)
def test_predicts_smaller_chunks(options: dict[str, int]) -> None:
    """In float32, where the CPU sums as a GPU does; nothing but the head has a gradient that could be the peak."""
    case = replace(FROZEN_BODY, dtype="float32")
    with use_implementation("triton"):
        row = benchmark.measure(case, "cpu", **options)
    assert abs(row["ratio"] - 1) < benchmark.OFF, row
    assert row["patched_peak"] < row["stock_peak"] / 3


SITE = LossSite(
    8192,
    torch.empty(128256, 4096, dtype=torch.bfloat16, device="meta"),
    torch.bfloat16,
    needs_dx=True,
    needs_dw=True,
    softcap=False,
    options=PatchOptions(),
)


def test_of_a_head_that_was_measured() -> None:
    """On an H100, eager PyTorch took 12024 MiB for this size; two chunks of ours are 2.0 GiB."""
    assert SITE.stock() == 12024 * MIB
    assert abs(SITE.fused() / (2 * 1024 * MIB) - 1) < 0.02


def test_terms() -> None:
    logits, weight, dx = 8192 * 128256 * 2, 128256 * 4096 * 2, 8192 * 4096 * 2
    assert replace(SITE, softcap=True).stock() - SITE.stock() == logits
    assert replace(SITE, tokens=64).stock() == 64 * 128256 * 2 + weight + 64 * 4096 * 2
    assert SITE.fused() == dx + weight + logits // 2
    frozen_body = replace(SITE, needs_dx=False)
    assert SITE.fused() - frozen_body.fused() == dx
    frozen_head = replace(SITE, needs_dw=False, options=PatchOptions(chunk_size=1024))
    assert frozen_head.fused() == dx + logits // 8
    exact = replace(SITE, options=PatchOptions(accum_dtype=torch.float32))
    assert exact.fused() > SITE.fused()
    wide = replace(SITE, weight=SITE.weight.float(), logits_dtype=torch.float32)
    assert wide.stock() == SITE.stock()  # the converted logits, or the logits
    assert wide.fused() == 2 * (dx + weight + logits // 8)
    autocast = replace(wide, logits_dtype=torch.bfloat16)
    assert autocast.stock() - wide.stock() == weight


def test_the_model_as_it_is_now() -> None:
    model = build("llama")
    report = liger_kernel.patch(model, chunk_size=8)
    hidden, weight, slab = 48 * 4, VOCAB * 48 * 4, 8 * VOCAB * 4
    stock = 3 * 4 * 64 * VOCAB
    assert report.savings(4, 16) == stock - (64 * hidden + weight + slab)
    model.lm_head.requires_grad_(False)
    assert report.savings(4, 16) == stock - (64 * hidden + slab)
    model.model.requires_grad_(False)
    assert report.savings(4, 16) == stock - slab
    before = report.savings(4, 16)
    model.to(torch.bfloat16)
    assert report.savings(4, 16) == before + slab // 2
    with torch.autocast("cpu", dtype=torch.float16):
        assert report.savings(4, 16) == before + slab // 2  # the converted weight is on both sides
    liger_kernel.unpatch(model)
    assert report.savings(4, 16) == 0


def test_a_tied_head_asks_for_the_gradient_of_the_hidden_states() -> None:
    """Its weight is that of the embedding, too."""
    model = build("qwen2")
    for p in model.parameters():
        p.requires_grad_(p is model.lm_head.weight)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    report = liger_kernel.patch(model, chunk_size=8)
    fused = 64 * 48 * 4 + VOCAB * 48 * 4 + 8 * VOCAB * 4
    assert report.savings(4, 16) == 3 * 4 * 64 * VOCAB - fused


def test_copies_ask_their_own_model() -> None:
    model = build("llama")
    liger_kernel.patch(model)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        report = liger_kernel.patch(twin)  # is patched already
        assert report.of is twin
        before = report.savings(2, 8)
        twin.lm_head.requires_grad_(False)
        assert report.savings(2, 8) > before
    assert liger_kernel.patch(model).savings(2, 8) == before


def test_nothing_fused_saves_nothing() -> None:
    assert liger_kernel.patch(build("llama"), fused_linear_cross_entropy=False).savings(2, 8) == 0
    assert liger_kernel.patch(nn.Linear(2, 2)).savings(2, 8) == 0


def test_a_loss_that_turns_out_not_to_be_fused_saves_nothing() -> None:
    model = build("llama").train()
    model.loss_function = lambda logits, **others: logits.exp().mean()
    report = liger_kernel.patch(model, chunk_size=8)
    assert report.savings(4, 16) > 0
    model(**batch())
    assert [row.kind for row in report.skipped] == ["loss"]
    assert report.savings(4, 16) == 0


def test_rows_that_are_not_true_any_more() -> None:
    model = build("llama")
    report = liger_kernel.patch(model)
    rows = list(report.rows)
    layers = model.model.layers
    kept = layers[0].input_layernorm
    layers[0].input_layernorm = nn.Identity()
    layers[0].mlp.forward = lambda x: x
    layers[1].mlp.act_fn = nn.Tanh()
    model.lm_head = nn.Identity()
    reasons = {row.path: row.reason for row in report.skipped}
    assert reasons == {
        "lm_head": "Identity does not compute a plain linear map",
        "model.layers.0": "input_layernorm is hooked, or no norm of ours any more",
        "model.layers.0.input_layernorm": "another module took its place after patching",
        "model.layers.0.mlp": "its forward was replaced after patching",
        "model.layers.1.mlp": "LlamaMLP has changed since it was replaced, and runs its own code",
    }
    assert f"{len(rows) - 5} replaced, 5 skipped" in str(report)
    layers[0].input_layernorm = kept
    assert len(report.skipped) == 3
    again = liger_kernel.patch(model)
    assert again is not report, "something of ours is gone"
    assert {row.path for row in again.skipped} == reasons.keys() - {
        "model.layers.0",
        "model.layers.0.input_layernorm",
    }
    liger_kernel.unpatch(model)
    assert {
        row.reason for row in again.rows if "mlp" not in row.path and row.path != "lm_head"
    } == {"the patch was taken back"}
    assert not again.replaced


def test_what_cannot_be_asked() -> None:
    report = liger_kernel.patch(build("llama"))
    for sizes in ((0, 8), (8, -1)):
        with pytest.raises(ValueError, match=f"batch={sizes[0]} and seq={sizes[1]}"):
            report.savings(*sizes)
    with pytest.raises(ValueError, match="belongs to no model"):
        PatchReport("Llama").savings(1, 1)


def test_the_benchmark_writes(tmp_path: Path) -> None:
    out = tmp_path / "savings.json"
    assert benchmark.main(["--device", "cpu", "--cases", "TinyLlama", "--out", str(out)]) == 0
    rows = json.loads(out.read_text())["rows"]
    assert [row["name"] for row in rows] == ["TinyLlama, float32"]
    assert rows[0]["measured"] == rows[0]["stock_peak"] - rows[0]["patched_peak"]


def test_the_report_as_a_rich_table() -> None:
    console = pytest.importorskip("rich.console").Console(
        width=120, record=True, file=io.StringIO()
    )
    report = PatchReport("Model")
    report.add("norm", "layers.0.norm", by="LigerRMSNorm[llama]")
    report.add("norm", "layers.1.norm", by="LigerRMSNorm[llama]")
    report.add("loss", "lm_head", reason="[quantised]")
    console.print(report)
    drawn = console.export_text()
    for text in (
        "Model: 2 replaced, 1 skipped",
        "layers.*.norm",
        "x2",
        "LigerRMSNorm[llama]",
        "[quantised]",
    ):
        assert text in drawn
        assert text in str(report)


def test_the_benchmark_prints() -> None:
    sizes = dict.fromkeys(("stock_peak", "patched_peak", "measured", "predicted"), 3 * MIB)
    shown = benchmark.show([{"name": "one", "batch": 2, "seq": 8, **sizes, "ratio": 1.0}])
    assert shown.splitlines()[-1] == "| one | 16 | 3.0 | 3.0 | 3.0 | 3.0 | 1.000 |"
