"""docs/compatibility.md and README's sentence about names say what is there."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests import compatibility
from tests.compatibility import Name


def test_page_and_readme_are_up_to_date() -> None:
    """In a process of its own: some names appear once another module has been imported."""
    pytest.importorskip("transformers")
    pytest.importorskip("triton")
    command = [sys.executable, "-m", "tests.compatibility", "--check"]
    done = subprocess.run(
        command, cwd=compatibility.ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_names_file() -> None:
    text = "# comment\na.b: x y\n  z\nc: x\n"
    assert compatibility.read_names(text) == [("a.b", "x"), ("a.b", "y"), ("a.b", "z"), ("c", "x")]
    names = compatibility.read_names(compatibility.NAMES_FILE.read_text(encoding="utf-8"))
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
    compatibility.PAGE.write_text(compatibility.page(found))
    sentence = compatibility.totals(found)
    compatibility.README.write_text(f"before\n<!-- {mark} -->\n{sentence}\n<!-- /{mark} -->\nafter")
    assert "| ops | 1 | 1 | 2 |" in compatibility.page(found)
    assert compatibility.outdated(found) == []
    changed = {**found, ("liger_kernel.ops", "b"): True}
    assert compatibility.outdated(changed) == [compatibility.PAGE, compatibility.README]
    renewed = compatibility.between_marks(
        "a\n<!-- compatibility -->\n1\n<!-- /compatibility -->\nb", "2"
    )
    assert renewed == "a\n<!-- compatibility -->\n2\n<!-- /compatibility -->\nb"
