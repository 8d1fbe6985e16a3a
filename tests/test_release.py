"""What `make release-check` would object to."""

from __future__ import annotations

import pytest

import liger_kernel
from tests.release import EXTRAS, PACKAGE, ROOT, SITE, check_metadata, check_names, needed_by

VERSION = liger_kernel.__version__
INFO = f"{PACKAGE}-{VERSION}.dist-info"
SOURCES = [p.relative_to(ROOT / "src").as_posix() for p in (ROOT / "src" / PACKAGE).rglob("*.py")]
NAMES = [*SOURCES, f"{PACKAGE}/py.typed", f"{INFO}/METADATA", f"{INFO}/licenses/LICENSE"]
METADATA = f"""\
Metadata-Version: 2.4
Name: liger-kernel
Version: {VERSION}
Requires-Dist: torch>=2.6
Requires-Dist: triton>=3.2; platform_system == "Linux" and extra == "cuda"
{"".join(f"Provides-Extra: {extra}" + chr(10) for extra in sorted(EXTRAS))}\
Description-Content-Type: text/markdown

# liger_kernel
"""


def test_a_wheel_that_is_right() -> None:
    assert check_names(NAMES, VERSION) == []
    assert check_metadata(METADATA, VERSION) == []


@pytest.mark.parametrize(
    ("added", "taken", "found"),
    [
        ("tests/test_imports.py", "", "does not belong"),
        ("", f"{PACKAGE}/py.typed", "is missing"),
        ("", f"{PACKAGE}/backends/triton.py", "is missing"),
        (f"{PACKAGE}/__pycache__/x.pyc", "", "cached"),
    ],
)
def test_files(added: str, taken: str, found: str) -> None:
    names = [name for name in (*NAMES, added) if name and name != taken]
    assert [found in line for line in check_names(names, VERSION)] == [True]


@pytest.mark.parametrize(
    ("old", "new", "found"),
    [
        ("Requires-Dist: torch", "Requires-Dist: triton\nRequires-Dist: torch", "more than torch"),
        ("Name: liger-kernel", "Name: liger", "not liger-kernel"),
        ("Provides-Extra: rocm\n", "", "its extras"),
        ("\n# liger_kernel\n", "", "no description"),
    ],
)
def test_metadata(old: str, new: str, found: str) -> None:
    assert old in METADATA
    assert [found in line for line in check_metadata(METADATA.replace(old, new), VERSION)] == [True]


def test_a_version_that_the_changelog_does_not_know() -> None:
    text = METADATA.replace(f"Version: {VERSION}", "Version: 99.0")
    assert check_metadata(text, "99.0") == ["CHANGELOG.md has no section for 99.0"]


def test_what_torch_needs() -> None:
    entries = needed_by("torch")
    assert {"torch", "sympy", "jinja2"} <= entries
    assert not {"triton", "transformers", "numpy"} & entries
    assert all((SITE / entry).exists() for entry in entries)
