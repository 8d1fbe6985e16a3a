"""The proof itself: what it finds in kernels with a fault each, and in a sample of the library."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest

from tests.aot import __main__, build, proof, table
from tests.aot.build import Measured
from tests.aot.targets import KIB, TARGETS

triton = pytest.importorskip("triton")
if not triton.__version__.startswith("3.6."):
    pytest.skip("calls functions of Triton that change with it", allow_module_level=True)

PLANTED = {
    "_hoards(": "shared_memory 131072 > 65536",
    "_spills(": "spilled ",
    "_lacks(": "LLD failed",
    "_adds_atomically(": "atomics are not deterministic",
    "_is_no_triton(": "range must be a power of 2",
    "_ends_its_process(": "the compiler ended its process",
    "_idle": "no case launches",
}
FEW = ("_spills(", "_lacks(", "_is_no_triton(")
#: of each target: which faults are to be found, the planted kernels to run, and the ops of the library
SAMPLES = {
    "sm_80": (
        {name: PLANTED[name] for name in FEW} | {"_lacks(": "ptxas"},
        tuple(name[1:-1] for name in FEW),
        ("relu_squared",),
    ),
    "gfx942": (PLANTED, (), ("scale_gradients", "relu_squared")),
}


@pytest.mark.parametrize("target", SAMPLES)
def test_finds_planted_faults_and_none_in_the_library(target: str, tmp_path: Path) -> None:
    planted, kernels, ops = SAMPLES[target]
    results = proof.Results(tmp_path / "results.jsonl")
    bad, good = proof.prove(
        [
            proof.Request(TARGETS[target], kernels, specs="tests.aot.planted"),
            proof.Request(TARGETS[target], ops),
        ],
        results,
    )
    assert good.measured
    assert not good.faults()
    lines = bad.faults()
    for name, fault in planted.items():
        assert any(name in line and fault in line for line in lines), (name, lines)
    assert not any("_sound(" in line for line in lines), lines
    assert all(line.startswith(f"{target}: ") for line in lines)

    again = proof.Results(results.path)
    assert again.known == results.known
    launches = [launch for launch, _ in good.measured]
    proof.measure_all(launches, again, None, lambda line: None)  # type: ignore[arg-type]  # no workers


@pytest.mark.parametrize(
    ("measured", "fault"),
    [
        (Measured(shared_memory=64 * KIB + 1), "shared_memory 65537 > 65536"),
        (Measured(threads=2048), "threads 2048 > 1024"),
        (Measured(spilled=build.MOST_SPILLED + 4), f"spilled {build.MOST_SPILLED + 4}"),
        (Measured(error="PTXASError: no"), "PTXASError: no"),
        (Measured(foreign=("atom.add.f32: why",)), "atom.add.f32: why"),
    ],
)
def test_limits(measured: Measured, fault: str) -> None:
    assert any(fault in line for line in build.faults(measured, "k", TARGETS["gfx942"]))
    full = Measured(shared_memory=64 * KIB, threads=1024, spilled=build.MOST_SPILLED)
    assert not build.faults(full, "k", TARGETS["gfx942"])


def test_a_cover_holds_every_pair_of_choices() -> None:
    from tests.aot.cover import choices, cover
    from tests.aot.record import Variant

    def variant(block: int, flag: bool, dtype: str) -> Variant:
        signature = (("x_ptr", f"*{dtype}"), ("BLOCK", "constexpr"), ("FLAG", "constexpr"))
        return Variant("m", "k", signature, (((1,), block), ((2,), flag)), (), ())

    every = [
        variant(*x)
        for x in itertools.product((16, 32, 64, 128), (True, False), ("fp32", "bf16", "fp16"))
    ]
    for size, most in ((1, 7), (2, 15)):
        chosen = cover(every, size)
        assert len(chosen) <= most
        met = {m for v in chosen for m in itertools.combinations(choices(v), size)}
        assert met == {m for v in every for m in itertools.combinations(choices(v), size)}
        for dtype in ("fp32", "bf16", "fp16"):
            assert variant(128, True, dtype) in chosen


@pytest.mark.parametrize("name", TARGETS)
def test_facts_are_those_of_the_records(name: str) -> None:
    target = TARGETS[name]
    facts = target.facts()
    assert facts.architecture
    assert facts.processors == target.processors
    assert facts.most_warps * target.warp_size == build.MOST_THREADS
    assert facts.shared_memory in (0, target.shared_memory)
    assert facts.streams is None


@pytest.mark.parametrize("name", TARGETS)
def test_two_long_sums_take_a_kernel_of_their_own_where_they_spill(name: str) -> None:
    """LayerNorm's, of more than 16384 columns: not on Hopper, where that was measured and is slower."""
    from liger_kernel.ops.norms.kernels import BackwardConfig

    facts = TARGETS[name].facts()
    config = BackwardConfig.of(16424, 8, 2, facts)
    assert config.two_kernels == (name != "sm_90")
    assert config.reload == (name == "sm_90")
    assert BackwardConfig.of(16384, 8, 2, facts).reload
    assert BackwardConfig.of(16424, 8, 1, facts).reload


def test_table_holds_the_numbers(tmp_path: Path) -> None:
    page, kept = tmp_path / "page.md", tmp_path / "kept.json"
    page.write_text("before\n<!-- aot -->\nold\n<!-- /aot -->\nafter\n")
    kernel = {"compiled": 3, "shared_memory": 1025, "threads": 64, "registers": 9, "spilled": 8}
    target = {"gpu": "g", "limit": 65536, "variants": 9, "compiled": 3, "faults": 0}
    found = {
        "triton": "3.6",
        "commit": "abc",
        "targets": {"gfx942": {**target, "kernels": {"ops.rope:_rope": kernel}}},
    }
    table.write(found, page, kept)
    text = page.read_text()
    assert text.startswith("before\n<!-- aot -->\n")
    assert text.endswith("<!-- /aot -->\nafter\n")
    assert "\nold\n" not in text
    assert "| `rope:_rope` | 2 / 9 / **8** |" in text
    assert json.loads(kept.read_text()) == found
    page.write_text("no place")
    with pytest.raises(ValueError, match="no place for the table"):
        table.write(found, page, kept)


def test_the_table_in_the_docs_is_that_of_the_numbers() -> None:
    assert table.table(json.loads(table.NUMBERS.read_text())) in table.PAGE.read_text()


def test_what_is_unknown_is_refused() -> None:
    with pytest.raises(SystemExit):
        __main__.main(["--targets", "sm_91"])
    with pytest.raises(ValueError, match=r"Unknown ops \['rms'\]; known: .*rms_norm"):
        proof.ops_of(proof.Request(TARGETS["sm_80"], ("rms",)))
    with pytest.raises(SystemExit, match="whole library"):
        __main__.main(["--write", "--ops", "rms_norm"])
