"""docs/compatibility.md and README's sentence about names say what is there."""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path

import pytest

from tests import compatibility
from tests.compatibility import Name
from tests.on_purpose import BEHAVIOURS


def test_page_and_readme_are_up_to_date() -> None:
    """In a process of its own: some names appear once another module has been imported."""
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("triton")
    from tests.transformers.zoo.releases import DOCUMENTED

    if transformers.__version__ != DOCUMENTED:
        pytest.skip(f"the page is about transformers {DOCUMENTED}, whose output classes we extend")
    command = [sys.executable, "-m", "tests.compatibility", "--check"]
    done = subprocess.run(
        command, cwd=compatibility.ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_names_file() -> None:
    text = "# comment\na.b: x y\n  z\n  F(a, b=()) apply(c)\nc: x\n"
    entries = compatibility.read_entries(text)
    assert [e.name for e in entries] == [
        ("a.b", "x"), ("a.b", "y"), ("a.b", "z"), ("a.b", "F"), ("c", "x"),
    ]  # fmt: skip
    assert [e.calls for e in entries] == [{}, {}, {}, {"": "a, b=()", "apply": "c"}, {}]
    names = [entry.name for entry in compatibility.entries()]
    assert len(names) == len(set(names)) == 671


@pytest.mark.parametrize(
    ("name", "there"),
    [
        (("liger_kernel.transformers", "LigerRMSNorm"), True),
        (("liger_kernel.ops.swiglu", "LigerSiLUMulFunction"), True),  # by an alias
        (("liger_kernel.transformers", "LigerNothing"), False),
        (("liger_kernel.nowhere", "LigerRMSNorm"), False),
        (("liger_kernel.nowhere.deeper", "LigerRMSNorm"), False),
    ],
)
def test_is_there(name: Name, there: bool) -> None:
    assert compatibility.is_there(*name) is there


def test_a_broken_module_is_no_missing_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "broken_module.py").write_text("import a_package_that_nobody_has")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ModuleNotFoundError, match="a_package_that_nobody_has"):
        compatibility.is_there("broken_module", "x")


@pytest.mark.parametrize(
    ("name", "area"),
    [
        (("liger_kernel.transformers", "apply_liger_kernel_to_llama"), "entry points"),
        (("liger_kernel.transformers", "_apply_liger_kernel"), "entry points"),
        (("liger_kernel.transformers.functional", "liger_rope"), "functional"),
        (("liger_kernel.functional", "rms_norm"), "functional"),
        (("liger_kernel.chunked_loss.functional", "liger_fused_linear_dpo"), "chunked losses"),
        (("liger_kernel.transformers.model.llama", "lce_forward"), "model forwards and outputs"),
        (("liger_kernel.transformers.rms_norm", "LigerRMSNorm"), "modules"),
        (("liger_kernel.ops", "rms_norm_forward"), "ops"),
        (("liger_kernel", "get_impl"), "others"),
    ],
)
def test_areas(name: Name, area: str) -> None:
    assert compatibility.area_of(name) == area


def test_a_name_that_comes_or_goes_changes_page_and_readme(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = {("liger_kernel.ops", "a"): True, ("liger_kernel.ops", "b"): False}
    monkeypatch.setattr(compatibility, "PAGE", tmp_path / "page.md")
    monkeypatch.setattr(compatibility, "README", tmp_path / "README.md")
    mark = compatibility.MARK
    compatibility.PAGE.write_text(compatibility.page(found, {}))
    sentence = compatibility.totals(found)
    compatibility.README.write_text(f"before\n<!-- {mark} -->\n{sentence}\n<!-- /{mark} -->\nafter")
    assert "| ops | 1 | 1 | 0 | 2 |" in compatibility.page(found, {})
    assert compatibility.outdated(found, {}) == []
    changed = {**found, ("liger_kernel.ops", "b"): True}
    assert compatibility.outdated(changed, {}) == [compatibility.PAGE, compatibility.README]
    differing = {"liger_kernel.ops.a": [("`x`", "not taken"), ("", "needs `y`")]}
    assert "| `x` | not taken; needs `y` |" in compatibility.page(found, differing)
    assert compatibility.outdated(found, differing) == [compatibility.PAGE]
    renewed = compatibility.between_marks(
        "a\n<!-- compatibility -->\n1\n<!-- /compatibility -->\nb", "2"
    )
    assert renewed == "a\n<!-- compatibility -->\n2\n<!-- /compatibility -->\nb"


@pytest.mark.parametrize(
    ("theirs", "ours", "found"),
    [
        ("a, b=1", "a, b=1, c=2", []),
        ("a, b", "a=None, b=1", []),
        ("a, b=1", "a, *args, **kwargs", []),
        ("a, b=1", "a, b=2", [("`b=1`", "`b=2`")]),
        ("a, b=1", "a", [("`b`", "not taken")]),
        ("a", "a, b", [("", "needs `b`")]),
        ("a, b=1, c=2", "a, c=2, b=1", [("`a, b, c`", "`a, c, b`")]),
        ("a, **kwargs", "a", [("`**kwargs`", "not taken")]),
    ],
)
def test_differences(theirs: str, ours: str, found: list[tuple[str, str]]) -> None:
    sides = map(compatibility.parameters, (theirs, ours))
    assert list(compatibility.differences(*sides)) == found


def test_differences_by_position() -> None:
    sides = list(map(compatibility.parameters, ("X, eps", "x, epsilon, mode=1")))
    assert list(compatibility.differences(*sides, by_name=False)) == []
    assert list(compatibility.differences(*sides))


def test_every_behaviour_that_differs_is_pinned_by_a_test() -> None:
    for behaviour in BEHAVIOURS:
        file, _, function = behaviour.test.partition("::")
        text = (compatibility.ROOT / "tests" / file).read_text(encoding="utf-8")
        assert f"\ndef {function}(" in text, behaviour


def test_what_is_missing_says_so_as_python_does() -> None:
    """No other error: frameworks guard these imports, some of them against ModuleNotFoundError alone."""
    pytest.importorskip("transformers")
    for module, name in (entry.name for entry in compatibility.entries()):
        if compatibility.is_there(module, name):
            continue
        try:
            found = importlib.import_module(module)
        except ModuleNotFoundError:
            continue
        with pytest.raises(AttributeError, match=name):
            getattr(found, name)
        with pytest.raises(ImportError, match=name):
            exec(f"from {module} import {name}")


def test_a_name_is_there_or_left_out_or_to_come(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is to come can only become less."""
    monkeypatch.setattr(compatibility, "MISSING_FILE", tmp_path / "missing.txt")
    monkeypatch.setattr(compatibility, "ABSENT", {r"a\.left_\w+": "why"})
    compatibility.MISSING_FILE.write_text("# comment\na: to_come\n")
    right = {("a", "there"): True, ("a", "left_out"): False, ("a", "to_come"): False}
    assert list(compatibility.faults(right)) == []
    assert compatibility.missing(right) == [("a", "to_come")]
    for change, fault in (
        ({("a", "there"): False}, "a.there is missing"),
        ({("a", "to_come"): True}, "a.to_come is in missing.txt, and there"),
        ({("a", "left_out"): True}, "a.left_out is in ABSENT, and there"),
        ({("a", "new"): False}, "a.new is missing"),
    ):
        assert list(compatibility.faults({**right, **change})) == [fault]
    found = {name: there for name, there in right.items() if name[1] == "there"}
    assert sorted(compatibility.faults(found)) == [
        "a.to_come is in missing.txt, and there",
        r"a\.left_\w+ of ABSENT is the name of nothing",
    ]
    text = compatibility.page(right, {})
    assert "| `a.left_out` | there | left out | why |" in text
    assert "| others | 1 | 1 | 1 | 3 |" in text
    assert "- `a`: `to_come`" in text
    assert "1 are still missing, 1 are left out on purpose" in compatibility.totals(right)
