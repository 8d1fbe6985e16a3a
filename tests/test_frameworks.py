"""What frameworks import from `liger_kernel` is there: `frameworks.txt` lists it."""

from __future__ import annotations

import importlib
import itertools
from pathlib import Path

import pytest

from liger_kernel.backends import IMPLEMENTATIONS

pytest.importorskip("transformers")
pytest.importorskip("triton")

ROWS = [
    tuple(line.split("\t"))
    for line in Path(__file__).with_name("frameworks.txt").read_text().splitlines()
    if not line.startswith("#")
]
FRAMEWORKS = {
    framework: {(module, name) for _, module, name in rows}
    for framework, rows in itertools.groupby(ROWS, key=lambda row: row[0])
}
#: what needs a kernel that is not written yet; a name that has come must go from here
GAPS: set[tuple[str, str]] = set()


def resolves(module: str, name: str) -> bool:
    """As `from module import name` does it, submodules included; `import module` where there is no name."""
    try:
        exec(f"from {module} import {name}" if name else f"import {module}", {})
    except ImportError:
        return False
    return True


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_every_import_resolves(framework: str) -> None:
    missing = {row for row in FRAMEWORKS[framework] if not resolves(*row)}
    assert not missing - GAPS


def test_gaps_are_gaps_and_somebody_misses_them() -> None:
    assert {row for row in GAPS if resolves(*row)} == set()
    assert set().union(*FRAMEWORKS.values()) >= GAPS
    assert len(ROWS) == sum(map(len, FRAMEWORKS.values())) == 136


def test_the_test_sees_what_is_missing() -> None:
    assert resolves("liger_kernel.ops", "rms_norm")
    assert not resolves("liger_kernel.ops", "no_such_name")
    assert not resolves("liger_kernel.no_such_module", "")


def test_loaded_implementations() -> None:
    """Axolotl looks for the module of an implementation among those that are loaded."""
    registry = importlib.import_module("liger_kernel.ops.backends.registry")
    for name, info in registry.IMPL_REGISTRY.items():
        assert info.name == name
        assert {*info.default_devices} <= {*info.devices}
        if IMPLEMENTATIONS[name].compiled:
            assert info.module_path == ""  # which axolotl finds loaded nowhere
        else:
            assert importlib.util.find_spec(info.module_path) is not None
    assert not {"cutile", "cutedsl"} & registry.IMPL_REGISTRY.keys()
