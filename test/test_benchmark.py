"""The benchmark's own logic, on the CPU: what it refuses, what it merges, what it prints. Times mean nothing here."""

from __future__ import annotations

import dataclasses
import importlib
import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from liger_kernel.backends import use_implementation
from liger_kernel.ops import OPS
from liger_kernel.testing import OpSpec

BENCHMARK = Path(__file__).resolve().parents[1] / "benchmark"
sys.path.insert(0, str(BENCHMARK))

import chunked  # noqa: E402
import e2e  # noqa: E402
import host  # noqa: E402
import measure  # noqa: E402
import providers  # noqa: E402
import results  # noqa: E402
import run as runner  # noqa: E402
import tables  # noqa: E402
import workload  # noqa: E402

LIMITS = measure.Ceilings(copy_gb_s=4000.0, gemm_tflop_s=800.0)
SPECS: dict[str, OpSpec] = {
    op: importlib.import_module(f"liger_kernel.ops.{op}.cases").SPEC for op in OPS
}


@pytest.fixture(autouse=True)
def no_ceilings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "ceilings", lambda device: LIMITS)


def benchmark(tmp_path: Path, *argv: str) -> tuple[int, list[dict[str, Any]]]:
    path = tmp_path / "results.json"
    code = runner.main([*argv, "--device", "cpu", "--quick", "--json", str(path)])
    return code, json.loads(path.read_text())["ops"]


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


@pytest.mark.parametrize("name", ["TORCH", "LIGER"])
def test_adapters_compute_the_op(name: str) -> None:
    """The incumbent's functions have the names and signatures of ours, so ours stand in for them."""
    pytest.importorskip("liger_kernel.transformers.functional")
    table = getattr(providers, name)
    assert set(table) <= set(OPS)
    for op, adapter in table.items():
        bound = 0
        for case in SPECS[op].cases[:4]:
            function = adapter(case.options)
            if function is not None:
                work = workload.Workload(SPECS[op], case, torch.float32, "cpu")
                work.check(function, exact_dtype=False)
                bound += 1
        assert bound or (op == "fused_linear_cross_entropy" and name == "TORCH"), f"no case of {op}"


def row(**more: Any) -> dict[str, Any]:
    return {
        "op": "a",
        "case": "c",
        "dtype": "bfloat16",
        "provider": "ours",
        "mode": "full",
        "ms": 2.0,
        **more,
    }


def test_results_merge_by_key_and_forget_unused_runs() -> None:
    first = {"gpu": "G", "date": "d1", "commit": "c" * 40}
    second = {**first, "date": "d2"}
    empty = results.load(Path("/nonexistent.json"))
    content = results.merge(empty, "ops", first, [row(), row(mode="fwd")])
    content = results.merge(content, "ops", second, [row(ms=1.0)])
    assert [(r["mode"], r["ms"], r["run"][:2]) for r in content["ops"]] == [
        ("full", 1.0, "d2"),
        ("fwd", 2.0, "d1"),
    ]
    content = results.merge(content, "ops", second, [row(mode="fwd")])
    assert list(content["runs"]) == ["d2 " + "c" * 10]
    with pytest.raises(ValueError, match=r"'G'.*'other'"):
        results.merge(content, "ops", {**first, "gpu": "other"}, [])


def test_results_of_several_processes_are_combined() -> None:
    first = {"gpu": "G", "date": "d1", "commit": "c" * 40}
    second = {**first, "date": "d2"}
    empty = results.load(Path("/nonexistent.json"))
    one = results.merge(empty, "ops", first, [row(), row(mode="fwd")])
    other = results.merge(empty, "ops", second, [row(ms=1.0), row(mode="bwd")])
    both = results.combined(one, other)
    assert [(r["mode"], r["ms"], r["run"][:2]) for r in both["ops"]] == [
        ("bwd", 2.0, "d2"),
        ("full", 1.0, "d2"),
        ("fwd", 2.0, "d1"),
    ]
    assert results.combined(both, one)["ops"][1]["ms"] == 2.0


def test_a_time_of_the_kernels_alone_is_shown() -> None:
    assert tables.time_cell(row(ms=None, gpu_ms=0.5), None) == "(0.5)"
    assert tables.time_cell(row(ms=None), None) == "-"
    assert tables.time_cell(row(ms=None, error="broken"), None) == "fails"
    only = tables.op_table([row(ms=None, gpu_ms=0.5)])
    assert "| c | full | (0.5) |" in only


def test_power_bound_cases_have_a_second_turn_in_the_opposite_order(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    times = iter((5.0, 3.0, 2.0, 6.0))  # ours, eager; eager again, ours again
    monkeypatch.setattr(runner, "host_inclusive", lambda *_: measure.Timing.of([next(times)]))
    setting = runner.Setting("cpu", torch.float32, ("full",), 1.0, LIMITS)
    pairs = runner.chosen(["fused_linear_cross_entropy"], ["mean"], "cpu")
    ours, slower, eager = runner.measure_here(pairs, ["ours", "eager"], setting, None)
    assert (ours["provider"], ours["ms"], ours["p80"]) == ("ours", 5.0, 5.0)
    assert (slower["provider"], slower["ms"]) == ("eager", 3.0)
    assert (eager["provider"], eager["ms"]) == ("eager", 2.0)
    flops = pairs[0][1].flops
    assert eager["rate"] == pytest.approx(flops / 2.0 / 1e9, rel=1e-12)


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
    pairs = runner.chosen(["rms_norm"], ["llama"], "cpu")
    rows = list(runner.measure_here(pairs, ["ours", "eager"], setting, None))
    assert not any("launches" in r for r in rows)
    for r in rows:
        r["allocations"] = 1  # counted on a GPU alone
    runner.count_launches(pairs, rows, setting)
    assert [r.get("launches") for r in rows] == [3, 3, None, None]


def test_every_mode_trains_every_row_in_one_process(tmp_path: Path) -> None:
    args = e2e.arguments(["--device", "cpu", "--quick", "--timeout", "60"])
    setups = [e2e.Setup("tiny", 16, 2), e2e.Setup("no-such-shape", 16, 2), e2e.Setup("tiny", 8, 1)]
    rows = list(e2e.in_child(args, setups, "stock"))
    assert [(r["shape"], r["seq"], "error" in r) for r in rows] == [
        ("tiny", 16, False),
        ("no-such-shape", 16, True),
        ("tiny", 8, False),
    ]
    assert "no-such-shape" in rows[1]["error"]
    assert rows[0]["tokens_per_s"] > 0


def test_a_row_that_takes_too_long_ends_its_process() -> None:
    args = e2e.arguments(["--device", "cpu", "--timeout", "1"])  # importing takes longer
    rows = list(e2e.in_child(args, [e2e.Setup("tiny", 16, 2), e2e.Setup("tiny", 8, 1)], "stock"))
    assert [row["seq"] for row in rows] == [16, 8]
    assert all("a row may take 1 s" in row["error"] for row in rows)


def test_plots_are_drawn(tmp_path: Path) -> None:
    plots = pytest.importorskip("plots")
    source = BENCHMARK / "results" / "nvidia-h100-80gb-hbm3.json"
    assert plots.main([str(source), str(tmp_path / "a.png")]) == 0
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a-sweep.png", "a.png"]


def test_tables_replace_what_is_between_their_markers() -> None:
    run = {"gpu": "G", "driver": "1", "torch": "2", "triton": "3", "date": "d", "commit": "c"}
    rows = [row(), row(provider="eager", ms=4.0, gpu_ms=3.0), row(case="d", provider="eager")]
    content = results.merge(results.load(Path("/nonexistent.json")), "ops", run, rows)
    markers = [
        f"<!-- benchmark:{kind} -->STALE<!-- /benchmark:{kind} -->" for kind in ("ops", "e2e")
    ]
    text = "\n".join(["before", *markers, "after"])
    filled = tables.filled(text, content)
    assert "STALE" not in filled
    assert filled.startswith("before\n")
    assert "| c | full | **2** | 4 (3) |" in filled
    assert "| d | full |  | **2** |" in filled
    assert tables.filled(filled, content) == filled


@pytest.mark.parametrize(
    ("page", "gpu"),
    [
        ("README.md", "nvidia-h100-80gb-hbm3"),
        ("docs/performance.md", "nvidia-h100-80gb-hbm3"),
        ("docs/h200.md", "nvidia-h200"),
    ],
)
def test_the_pages_show_the_results(page: str, gpu: str) -> None:
    root = Path(tables.__file__).parents[1]
    content = results.load(root / "benchmark" / "results" / f"{gpu}.json")
    text = (root / page).read_text()
    assert "<!-- benchmark:" in text
    assert tables.filled(text, content) == text, (
        "run benchmark/tables.py with the results and this page"
    )


def test_the_shapes_are_the_models_they_are_named_after() -> None:
    pytest.importorskip("transformers")
    assert {shape for shape, *_ in e2e.TABLE} <= set(e2e.SHAPES)
    for shape, parameters in (("llama-3.2-1b", 1_235_814_400), ("qwen3-0.6b", 596_049_920)):
        model = e2e.build(shape, 64, False, "meta")
        assert sum(p.numel() for p in model.parameters()) == parameters


def test_host_times_are_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "CALLS", 1)
    monkeypatch.delitem(host.WAYS, "kernels")  # the interpreter, where there is no GPU
    monkeypatch.setitem(host.WAYS, "one thread", host.WAYS["ours"])
    monkeypatch.setattr(host, "floor", lambda device: iter(()))
    path = tmp_path / "results.json"
    host.main(["relu_squared", "--device", "cpu", "--json", str(path)])
    found = {row["provider"]: row for row in json.loads(path.read_text())["host"]}
    assert set(found) == set(host.WAYS)
    assert all(row["fwd_us"] > 0 for row in found.values())
    with pytest.raises(SystemExit):
        host.main(["no_such_op", "--device", "cpu"])


def test_host_times_are_shown_beside_the_floor() -> None:
    run = {"gpu": "G", "date": "d1", "commit": "c" * 40, "driver": "1", "torch": "2", "triton": "3"}
    rows = [
        {"op": op, "case": "c", "provider": p, "fwd_us": 10.2, "bwd_us": 20.6}
        for op, p in (("-", "kernels"), ("a", "ours"), ("a", "eager"))
    ]
    content = results.merge(results.load(Path("/nonexistent.json")), "host", run, rows)
    table = tables.filled("<!-- benchmark:host -->\n<!-- /benchmark:host -->", content)
    assert "| - | c |  | 10 / 21 |  |  |" in table
    assert "| a | c | 10 / 21 |  |  | 10 / 21 |" in table
    assert "commit cccccccccc, d1 UTC." in table


def test_a_loss_after_fewer_steps_says_so() -> None:
    step = {"tokens_per_s": 5.0, "peak_gb": None, "loss": 2.0, "steps": 8}
    assert tables.e2e_cell(step, 6.0, 9) == "5 / 2.0000 (step 8)"
    assert tables.e2e_cell(step, 6.0, 8) == "5 / 2.0000"


def test_the_fastest_head_is_bold_whoever_it_is() -> None:
    key = {"op": tables.LOSS_HEAD, "allocations": 1}
    rows = [
        row(**key, ms=2.0, peak_mb=10.0),
        row(**key, ms=1.5, peak_mb=20.0, provider="liger"),
        row(**key, error="OutOfMemoryError: 1 GiB", provider="cce", ms=None),
    ]
    table = tables.head_table({"ops": rows})
    assert "| c | 2 ms / 10 MB | **1.5 ms / 20 MB** | out of memory |" in table


def test_runs_of_one_commit_share_a_line() -> None:
    run = {"gpu": "G", "commit": "c" * 40, "driver": "1", "torch": "2", "triton": "3"}
    content = results.load(Path("/nonexistent.json"))
    for day, case, copy in (("1", "c", 10.4), ("2", "d", 9.6), ("2", "e", None)):
        more = {"date": f"2026-01-0{day} 10:00:00", "copy_gb_s": copy, "gemm_tflop_s": 7.0}
        content = results.merge(content, "ops", {**run, **more}, [row(case=case)])
    (line,) = tables.provenance(content, "ops").splitlines()
    assert line.endswith(
        "commit cccccccccc, 2026-01-01 and 2026-01-02 UTC; copy 10 GB/s; matrix product 7 TFLOP/s."
    )


def test_losses_on_log_probabilities_are_measured_and_shown(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    command = ["--device", "cpu", "--shape", "tiny", "--json", str(path)]
    assert chunked.main(command) == 0
    content = json.loads(path.read_text())
    found = {(row["loss"], row["mode"]): row for row in content["chunked"]}
    assert set(found) == {(loss, mode) for loss in chunked.LOSSES for mode in ("ours", "eager")}
    assert all(row["ms"] > 0 for row in found.values())
    assert not any("package" in row for row in found.values())
    found["dpo", "eager"].update(ms=1e6, peak_mb=1234.5, compared="worse: dW")
    table = tables.filled("<!-- benchmark:chunked -->\n<!-- /benchmark:chunked -->", content)
    assert "| dpo tiny | **" in table
    assert " | 1000000.0 ms / 1,234 MB† | " in table
    with pytest.raises(SystemExit):
        chunked.main([*command, "--modes", "incumbent"])


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
    assert chunked.main([*command, "--peer-site", str(tmp_path / "site")]) == 1
    found = {row["loss"]: row for row in json.loads(path.read_text())["chunked"]}
    assert found["dpo"]["compared"].startswith("worse: loss: max error")
    assert found["dpo"]["ms"] > 0
    assert "LigerFusedLinearGRPOLoss" in found["grpo"]["error"]


def test_a_wrong_loss_is_found() -> None:
    loss = chunked.LOSSES["dpo"]
    assert chunked.wrong(loss, loss.eager, "cpu") is None
    assert chunked.wrong(loss, lambda i: loss.eager(i) * 1.1, "cpu").startswith("loss: max error")
