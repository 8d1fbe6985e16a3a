"""The benchmark's own logic, on the CPU: what it measures and what it refuses. Times mean nothing here."""

from __future__ import annotations

import dataclasses
import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmark import (
    e2e,
    host,
    losses,
    measure,
    providers,
    results,
    shapes,
    sharded,
    tables,
    trl_head,
    workload,
)
from benchmark import run as runner
from liger_kernel.backends import use_implementation
from liger_kernel.ops import SERVED
from liger_kernel.testing import specs

LIMITS = measure.Ceilings(copy_gb_s=4000.0, gemm_tflop_s=800.0)
SPECS = specs()
ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(autouse=True)
def no_ceilings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "ceilings", lambda device: LIMITS)


def benchmark(tmp_path: Path, *argv: str) -> tuple[int, list[dict[str, Any]]]:
    path = tmp_path / "results.json"
    code = runner.main([*argv, "--device", "cpu", "--quick", "--json", str(path)])
    return code, json.loads(path.read_text())["ops"]


def chosen(op: str, case: str) -> runner.Pairs:
    return runner.chosen(runner.arguments([op, "--case", case, "--device", "cpu"]))


def test_a_rate_is_measured_against_the_ceiling_that_binds() -> None:
    copy = measure.rate(ms=2.0, nbytes=4e9, flops=1e9, limits=LIMITS)
    assert copy is not None
    assert (copy.unit, copy.value, copy.percent) == ("GB/s", 2000.0, 50.0)
    product = measure.rate(ms=10.0, nbytes=1e6, flops=2e12, limits=LIMITS)
    assert product is not None
    assert (product.unit, product.value, product.percent) == ("TFLOP/s", 200.0, 25.0)
    assert measure.rate(1.0, 0, 0, LIMITS) is None


def test_ops_are_named_with_or_without_a_flag() -> None:
    assert runner.arguments(["rms_norm", "glu", "--device", "cpu"]).ops == ["rms_norm", "glu"]
    assert runner.arguments(["--op", "rms_norm", "--device", "cpu"]).ops == ["rms_norm"]
    assert runner.arguments(["--device", "cpu"]).ops == []


def test_percentiles() -> None:
    timing = measure.Timing.of([5.0, 1.0, 3.0, 2.0, 4.0, 6.0])
    assert (timing.ms, timing.p20, timing.p80) == (3.5, 2.0, 5.0)
    assert measure.Timing.of([7.0]) == measure.Timing(7.0, 7.0, 7.0)


def test_forward_and_backward_share_the_bytes_of_the_full_call() -> None:
    spec = SPECS["rms_norm"]
    case = next(case for case in spec.cases if case.id == "llama")  # 37 x 96
    work = workload.Workload(spec, case, torch.bfloat16, "cpu")
    n = 2 * 37 * 96
    weight = 2 * 96
    assert work.work("full") == (5 * n, 0)
    assert work.work("fwd") == (2 * n + weight, 0)
    assert work.work("bwd") == (3 * n - weight, 0)


def test_a_scalar_loss_gets_the_gradient_of_loss_backward() -> None:
    work = workload.Workload(
        SPECS["cross_entropy"], SPECS["cross_entropy"].cases[0], torch.bfloat16, "cpu"
    )
    assert {i: g.tolist() for i, g in work.grads.items()} == {0: 1.0}


def test_a_frozen_input_gets_no_gradient_from_anybody() -> None:
    spec = SPECS["fused_linear_cross_entropy"]
    case = dataclasses.replace(spec.cases[0], frozen=(1,))
    work = workload.Workload(spec, case, torch.float32, "cpu")
    (full,) = work.calls(partial(spec.function, **case.options), "full")
    assert full()[1].keys() == {0}
    frozen, dense = (
        next(c for c in spec.cases if c.id == f"8192x4096x128256{end}")
        for end in ("-frozen-head", "")
    )
    assert frozen.flops / dense.flops == 2 / 3


def test_a_case_in_place_is_compared_and_timed_beside_everybody() -> None:
    spec = SPECS["cross_entropy"]
    case = dataclasses.replace(spec.cases[0], options={"in_place": True})
    work = workload.Workload(spec, case, torch.float32, "cpu")
    for name in ("ours", "eager", "torch"):
        function = providers.PROVIDERS[name].bind(spec, case)
        assert function is not None, name
        with use_implementation("triton" if name == "ours" else None):
            assert work.check(function) == "all rows"
            (full,) = work.calls(function, "full")
            full(), full()


def test_a_sample_holds_the_first_and_the_last_row() -> None:
    t = torch.arange(3 * workload.SAMPLE).reshape(-1, 64)
    kept = workload.sample(t)
    assert kept.numel() == workload.SAMPLE
    assert torch.equal(kept[0], t[0])
    assert torch.equal(kept[-1], t[-1])


def test_rows_are_measured_and_kept(tmp_path: Path) -> None:
    code, rows = benchmark(
        tmp_path, "rms_norm", "--providers", "ours,eager,torch", "--mode", "full,fwd"
    )
    assert code == 0
    assert {(row["provider"], row["mode"]) for row in rows} == {
        (provider, mode) for provider in ("ours", "eager", "torch") for mode in ("fwd", "full")
    }
    for row in rows:
        assert row["compared"] == "all rows"
        assert 0 < row["p20"] <= row["ms"] <= row["p80"]
        assert row["unit"] == "GB/s"


@pytest.mark.parametrize("provider", ["ours", "torch"])
def test_wrong_numbers_get_no_speed_of_ours_and_a_mark_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, provider: str
) -> None:
    wrong = providers.Provider("wrong", lambda spec, case: lambda x, weight: x * weight)
    monkeypatch.setitem(providers.PROVIDERS, provider, wrong)
    code, rows = benchmark(tmp_path, "rms_norm", "--providers", provider, "--mode", "fwd")
    if provider == "ours":
        assert code == 1
        assert "wrong numbers" in rows[0]["error"]
        assert "ms" not in rows[0]
    else:
        assert code == 0
        assert rows[0]["compared"].startswith("worse")
        assert "†" in tables.time_cell(rows[0], None)


def test_one_failing_provider_leaves_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(spec: Any, case: Any) -> Any:
        raise RuntimeError("no such kernel\nsecond line")

    monkeypatch.setitem(providers.PROVIDERS, "ours", providers.Provider("fails", fail))
    code, rows = benchmark(tmp_path, "rms_norm", "--providers", "ours,eager", "--mode", "fwd")
    assert code == 1
    by_provider = {row["provider"]: row for row in rows}
    assert by_provider["ours"]["error"] == "RuntimeError: no such kernel"
    assert by_provider["eager"]["ms"] > 0


def test_a_peer_with_our_name_runs_in_its_own_process(tmp_path: Path) -> None:
    """The stand-in multiplies wrongly on purpose, so that it cannot be mistaken for ours."""
    package = tmp_path / "site" / "liger_kernel" / "transformers"
    package.mkdir(parents=True)
    (package.parent / "__init__.py").touch()
    (package / "__init__.py").touch()
    (package / "functional.py").write_text(
        "print('noise')\ndef liger_rms_norm(X, W, eps, offset, casting_mode): return X * W\n"
    )
    metadata = tmp_path / "site" / "liger_kernel-0.8.5.dist-info" / "METADATA"
    metadata.parent.mkdir()
    metadata.write_text("Metadata-Version: 2.1\nName: liger-kernel\nVersion: 0.8.5\n")
    site = str(tmp_path / "site")
    code, rows = benchmark(
        tmp_path, "rms_norm", "--providers", "liger", "--mode", "fwd", "--peer-site", site
    )
    assert code == 0
    (row,) = rows
    assert (row["provider"], row["version"]) == ("liger", "0.8.5")
    assert row["compared"].startswith("worse")


def test_memory_is_handed_back_before_a_peer_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []

    def event(name: str) -> Any:
        return lambda *_: iter([events.append(name)][:0])

    for function, name in (
        ("measure_here", "ours"),
        ("release", "free"),
        ("measure_in_child", "peer"),
    ):
        monkeypatch.setattr(runner, function, event(name))
    monkeypatch.setattr(runner.sources, "has_package", lambda *_: True)
    args = runner.arguments(["rms_norm", "--device", "cpu", "--providers", "ours,liger"])
    assert not list(
        runner.all_rows(args, runner.Setting("cpu", torch.float32, ("fwd",), 1, LIMITS))
    )
    assert events == ["ours", "free", "peer"]


def test_no_graph_is_captured_that_could_run_out_of_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (40e9, 80e9))
    measure._check_room(20_000)
    with pytest.raises(measure.NotCapturable, match="40002 MB, and 40000 MB are free"):
        measure._check_room(20_001)


def bound_and_right(provider: str) -> set[str]:
    """The ops of which it computes one of the first cases, all of them right."""
    found = set()
    for op, spec in SPECS.items():
        for case in spec.cases[:4]:
            function = providers.PROVIDERS[provider].bind(spec, case)
            if function is not None:
                work = workload.Workload(spec, case, torch.float32, "cpu")
                work.check(function, exact_dtype=False)
                found.add(op)
    return found


def test_adapters_of_torch_compute_the_op() -> None:
    assert {*providers.TORCH} - bound_and_right("torch") <= {"fused_linear_cross_entropy"}


def test_every_op_that_the_incumbent_has_is_measured_beside_it() -> None:
    """The incumbent's functions have the names and signatures of ours, so ours stand in for them.

    Not beside it: its gated MLP runs on a few GPUs only, its tiled one takes a module, its GRPO one advantage for a
    sequence, whose logits have a row that nobody reads; shards need several processes; the others are no functions
    of its own. Nor are ops for which `OPS` has no name of it."""
    pytest.importorskip("liger_kernel.transformers.functional")
    apart = {
        "gated_mlp",
        "grpo_loss",
        "mhc_project",
        "mhc_sinkhorn",
        "tiled_mlp",
        "vocab_parallel_cross_entropy",
        "vocab_parallel_logprobs",
    }
    named = {op for op, names in SERVED.items() if names}
    bound = bound_and_right("liger")
    assert {*providers.LIGER} <= bound
    assert named & set(SPECS) - bound == apart


def test_results_of_a_cpu_are_not_committed() -> None:
    path = results.default_path("cpu").relative_to(ROOT)
    patterns = (ROOT / ".gitignore").read_text().split()
    assert any(path.match(pattern) for pattern in patterns)


def test_power_bound_cases_have_a_second_turn_in_the_opposite_order(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    times = iter((5.0, 3.0, 2.0, 6.0))  # ours, eager; eager again, ours again
    monkeypatch.setattr(runner, "host_inclusive", lambda *_: measure.Timing.of([next(times)]))
    setting = runner.Setting("cpu", torch.float32, ("full",), 1.0, LIMITS)
    pairs = chosen("fused_linear_cross_entropy", "mean")
    ours, slower, eager = runner.measure_here(pairs, ["ours", "eager"], setting)
    assert (ours["provider"], ours["ms"], ours["p80"]) == ("ours", 5.0, 5.0)
    assert (slower["provider"], slower["ms"]) == ("eager", 3.0)
    assert (eager["provider"], eager["ms"]) == ("eager", 2.0)
    flops = pairs[0][1].flops
    assert eager["rate"] == pytest.approx(flops / 2.0 / 1e9, rel=1e-12)


def test_calls_that_wait_for_the_host_have_a_second_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "host_inclusive", lambda *_: measure.Timing.of([3.0]))
    setting = runner.Setting("cpu", torch.float32, ("fwd",), 1.0, LIMITS)
    ((spec, case),) = chosen("rms_norm", "llama")
    work = workload.Workload(spec, case, torch.float32, "cpu")
    rows = [
        {"provider": "ours", "mode": "fwd", "ms": 5.0, **more}
        for more in ({"gpu_ms": 4.5}, {}, {"gpu_ms": 4.0, "rate": 7.0})
    ]
    (again,) = runner.second_turn(work, rows, {"ours": spec.function}, setting)
    assert (again["ms"], again["gpu_ms"], again["rate"]) == (3.0, 4.0, 7.0)


def test_the_better_turn_is_kept_and_a_failing_one_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    times = iter((5.0, 3.0, 2.0))  # ours, eager; eager again; then the memory is gone

    def timed(*_: Any) -> measure.Timing:
        for ms in times:
            return measure.Timing.of([ms])
        raise torch.OutOfMemoryError("1 GiB")

    monkeypatch.setattr(runner, "host_inclusive", timed)
    op = "fused_linear_cross_entropy"
    code, rows = benchmark(tmp_path, op, "--providers", "ours,eager", "--mode", "full")
    assert code == 0
    assert {row["provider"]: row["ms"] for row in rows} == {"ours": 5.0, "eager": 2.0}
    out, err = capsys.readouterr()
    assert "2 rows in " in out
    assert "OutOfMemoryError: 1 GiB; the first stands" in err


def test_launches_are_counted_after_the_last_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """The profiler stays attached to its process: it must not run between two times."""
    monkeypatch.setattr(runner, "launches", lambda call: call() is not None and 3)
    setting = runner.Setting("cpu", torch.float32, ("fwd", "full"), 1.0, LIMITS)
    pairs = chosen("rms_norm", "llama")
    rows = list(runner.measure_here(pairs, ["ours", "eager"], setting))
    assert not any("launches" in r for r in rows)
    for r in rows:
        r["allocations"] = 1  # counted on a GPU alone
    runner.count_launches(pairs, rows, setting)
    assert [r.get("launches") for r in rows] == [3, 3, None, None]


def test_every_mode_trains_every_row_in_one_process(tmp_path: Path) -> None:
    args = e2e.arguments(["--device", "cpu", "--quick", "--timeout", "60"])
    setups = [
        shapes.Setup("tiny", 16, 2),
        shapes.Setup("no-such-shape", 16, 2),
        shapes.Setup("tiny", 8, 1, rank=4, head=True),
    ]
    rows = list(e2e.in_child(args, setups, "stock"))
    assert [(r["shape"], r["seq"], "error" in r) for r in rows] == [
        ("tiny", 16, False),
        ("no-such-shape", 16, True),
        ("tiny", 8, False),
    ]
    assert "no-such-shape" in rows[1]["error"]
    assert rows[0]["tokens_per_s"] > 0


def test_a_rank_reports_its_step_or_its_error() -> None:
    options = "--device cpu --shape tiny --ranks 1 --seq 8 --batch 1 --steps 1 --warmup 0"
    args = sharded.arguments(options.split())
    row = sharded.measured(args, "ddp", "stock")
    assert row["tokens_per_s"] == pytest.approx(8e3 / row["step_ms"])
    args.shape = "no-such-shape"
    assert "no-such-shape" in sharded.measured(args, "ddp", "stock")["error"]


def test_what_reads_the_logits_leaves_the_output() -> None:
    found = {}
    for mode in ("patched", "patched+accuracy", "patched+logits"):
        model = e2e.MODES[mode](e2e.build(shapes.Setup("tiny", 8, 1), "cpu"))
        output = model(input_ids=torch.arange(8)[None], labels=torch.arange(8)[None])
        found[mode] = output.loss.item()
        if mode == "patched+accuracy":
            assert output.token_accuracy is not None
    assert len(set(found.values())) == 1


def test_a_row_that_takes_too_long_ends_its_process() -> None:
    args = e2e.arguments(["--device", "cpu", "--timeout", "1"])  # importing takes longer
    rows = list(
        e2e.in_child(args, [shapes.Setup("tiny", 16, 2), shapes.Setup("tiny", 8, 1)], "stock")
    )
    assert [row["seq"] for row in rows] == [16, 8]
    assert all("a row may take 1 s" in row["error"] for row in rows)


def test_the_shapes_are_the_models_they_are_named_after() -> None:
    pytest.importorskip("transformers")
    assert {shape for shape, *_ in shapes.STEPS} | set(shapes.DEMO) <= set(shapes.MODELS)
    for shape, parameters in (("llama-3.2-1b", 1_235_814_400), ("qwen3-0.6b", 596_049_920)):
        model = e2e.build(shapes.Setup(shape, 64, 1), "meta")
        assert sum(p.numel() for p in model.parameters()) == parameters


def test_host_times_are_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "CALLS", 1)
    monkeypatch.delitem(host.WAYS, "kernels")  # the interpreter, where there is no GPU
    monkeypatch.setitem(host.WAYS, "one thread", host.WAYS["ours"])
    monkeypatch.setattr(host, "floor", lambda device: iter(()))
    path = tmp_path / "results.json"
    host.main(["relu_squared", "--device", "cpu", "--json", str(path), "--base", str(ROOT)])
    found = {row["provider"]: row for row in json.loads(path.read_text())["host"]}
    assert set(found) == {*host.WAYS, "base"}
    assert all(row["fwd_us"] > 0 for row in found.values())
    with pytest.raises(SystemExit):
        host.main(["no_such_op", "--device", "cpu"])


SOME_LOSSES = ("dpo", "policy-entropy")


def test_losses_on_log_probabilities_are_measured_and_shown(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    command = ["--device", "cpu", "--shape", "tiny", "--json", str(path), "--losses", *SOME_LOSSES]
    assert losses.main([*command, "--base", str(ROOT)]) == 0
    content = json.loads(path.read_text())
    found = {(row["loss"], row["mode"]): row for row in content["chunked"]}
    assert set(found) == {
        (loss, mode) for loss in SOME_LOSSES for mode in ("ours", "eager", "base")
    }
    assert all(row["ms"] > 0 for row in found.values())
    assert not any("package" in row for row in found.values())
    found["dpo", "eager"].update(ms=1e6, peak_mb=1234.5, compared="worse: dW")
    table = tables.filled("<!-- benchmark:chunked -->\n<!-- /benchmark:chunked -->", content)
    assert "| dpo tiny | **" in table
    assert " | 1000000.0 ms / 1,234 MB† | " in table
    with pytest.raises(SystemExit):
        losses.main([*command, "--modes", "incumbent"])


def test_the_incumbent_of_the_losses_is_the_one_under_its_site(tmp_path: Path) -> None:
    package = tmp_path / "site" / "liger_kernel"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (package / "chunked_loss.py").write_text(
        "class LigerFusedLinearDPOLoss:\n"
        "    def __init__(self, **options): pass\n"
        "    def __call__(self, weight, hidden, *others): return (weight.sum() + hidden.sum(),)\n"
    )
    path = tmp_path / "results.json"
    command = ["--device", "cpu", "--shape", "tiny", "--json", str(path), "--modes", "incumbent"]
    command += ["--losses", "dpo", "grpo"]
    assert losses.main([*command, "--peer-site", str(tmp_path / "site")]) == 1
    found = {row["loss"]: row for row in json.loads(path.read_text())["chunked"]}
    assert found["dpo"]["compared"].startswith("worse: loss: error is")
    assert found["dpo"]["ms"] > 0
    assert "LigerFusedLinearGRPOLoss" in found["grpo"]["error"]


def test_steps_by_the_fused_head_of_trl(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "results.json"
    command = ["--device", "cpu", "--shape", "tiny", "--steps", "grpo", "--json", str(path)]
    try:
        assert trl_head.main(command) == 0
    except SystemExit:
        assert "TRL 1.16" in capsys.readouterr().err
        pytest.skip("no TRL with a fused head")
    found = {row["mode"]: row for row in json.loads(path.read_text())["chunked"]}
    assert set(found) == {"trl", "ours"}
    assert 0 <= found["ours"]["difference"] < trl_head.AGREE
    table = tables.chunked_table(json.loads(path.read_text()))
    assert "| grpo-step tiny | " in table


@pytest.mark.parametrize("name", losses.LOSSES)
def test_every_loss_is_compared_with_a_formula_of_its_own(name: str) -> None:
    loss = losses.LOSSES[name]
    assert losses.wrong(loss, loss.fused(), "cpu") is None


def test_a_wrong_loss_is_found() -> None:
    loss = losses.LOSSES["dpo"]
    assert losses.wrong(loss, loss.eager, "cpu") is None
    assert losses.wrong(loss, lambda i: loss.eager(i) * 1.1, "cpu").startswith("loss: error is")
