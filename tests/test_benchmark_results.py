"""What becomes of measured rows: the file that keeps them, the tables and the plots."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from benchmark import results, tables

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmark" / "results"


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


H100 = "nvidia-h100-80gb-hbm3"


def texts(svg: str) -> list[str]:
    return re.findall(r"<text[^>]*>([^<]*)</text>", svg)


def test_the_pictures_show_the_results(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """To the byte by the pinned matplotlib; every name and number by any other one."""
    plots = pytest.importorskip("benchmark.plots")
    assert plots.main([str(RESULTS / f"{H100}.json"), str(tmp_path)]) == 0
    assert "left out" not in capsys.readouterr().out
    made = {path.name: path.read_text() for path in tmp_path.iterdir()}
    kept = {path.name: path.read_text() for path in plots.TARGET.glob("*.svg")}
    assert made.keys() == kept.keys(), "run `python -m benchmark plots`"
    version = re.compile(r"Matplotlib v[\d.]+")
    for name, drawn in made.items():
        assert texts(drawn) == texts(kept[name]), f"{name}: run `python -m benchmark plots`"
        if version.findall(drawn) == version.findall(kept[name]):
            assert drawn == kept[name], f"{name}: run `python -m benchmark plots`"


def test_a_picture_is_small_and_says_who_and_where() -> None:
    plots = pytest.importorskip("benchmark.plots")
    content = results.load(RESULTS / f"{H100}.json")
    for name, make in plots.PICTURES.items():
        picture = make(content)
        shown = vars(picture)
        assert len(shown.get("values", ())) <= 5, name
        assert len(shown.get("series", ())) <= 4, name
        assert len(shown.get("points", ())) <= 5, name
        assert len(picture.title) <= 60, name
        assert f"{content['gpu']}, bf16, torch 2." in picture.caption, name
        light, dark = (plots.svg(picture, kind) for kind in plots.THEMES)
        assert texts(light) == texts(dark), name
        assert light != dark, name
        assert not re.search(r"<image|href=.http|url\(http", light), name


def test_a_claim_is_that_of_the_results() -> None:
    """A title is made of the numbers beneath it, so that it cannot outlive them."""
    plots = pytest.importorskip("benchmark.plots")
    content = results.load(RESULTS / f"{H100}.json")
    rows = [{**r, "tokens_per_s": r["tokens_per_s"] * (1 + (r["mode"] == "patched"))}
            for r in content["e2e"]]  # fmt: skip
    before, after = (
        plots.PICTURES["step-speed"](c).title for c in (content, {**content, "e2e": rows})
    )
    assert "1.4 times" in before
    assert "2.8 times" in after


def test_pictures_without_rows_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plots = pytest.importorskip("benchmark.plots")
    assert plots.main([str(RESULTS / "nvidia-h200.json"), str(tmp_path / "a")]) == 0
    assert "step-speed: left out" not in capsys.readouterr().out
    (tmp_path / "empty.json").write_text("{}")
    assert plots.main([str(tmp_path / "empty.json"), str(tmp_path / "b")]) == 1
    assert "step-speed: left out, these results have no" in capsys.readouterr().out


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
        ("docs/problems/out-of-memory.md", "nvidia-h100-80gb-hbm3"),
        ("docs/problems/preference-and-rl.md", "nvidia-h100-80gb-hbm3"),
        ("docs/h200.md", "nvidia-h200"),
    ],
)
def test_the_pages_show_the_results(page: str, gpu: str) -> None:
    content = results.load(RESULTS / f"{gpu}.json")
    text = (ROOT / page).read_text()
    assert "<!-- benchmark:" in text
    assert tables.filled(text, content) == text, (
        "run `python -m benchmark tables` with the results and this page"
    )


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
    assert tables.e2e_cell({**step, "loss": None}, 6.0, 9) == "5"


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


def test_the_table_of_the_processor_is_that_of_its_results() -> None:
    content = results.load(RESULTS / "intel-r-xeon-r-processor.json")
    page = (ROOT / "docs" / "hardware.md").read_text()
    assert tables.filled(page, content) == page
    changed = {**content, "ops": [{**row, "ms": 1.0} for row in content["ops"]]}
    assert tables.filled(page, changed) != page
