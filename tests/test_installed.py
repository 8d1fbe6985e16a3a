"""`liger-kernel-nightly`, and leftovers, in the folder that we are installed into: said once at import."""

from __future__ import annotations

import builtins
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

import liger_kernel
from liger_kernel._core.installed import strangers

VERSION = liger_kernel.__version__
OURS = f"liger_kernel-{VERSION}.dist-info"


def plant(site: Path, dist_info: str, *files: str) -> None:
    (site / dist_info).mkdir()
    rows = "".join(f"{file},sha256=x,1\n" for file in files)
    if files:
        (site / dist_info / "RECORD").write_text(rows)


OWNED = ("liger_kernel/__init__.py", "liger_kernel/ops/rms_norm.py")


@pytest.mark.parametrize(
    ("dist_info", "files", "found"),
    [
        ("liger_kernel_nightly-0.8.5.dev20261127.dist-info", OWNED, ["liger-kernel-nightly 0.8.5.dev20261127"]),
        ("liger-kernel-nightly-1.0.dist-info", OWNED, ["liger-kernel-nightly 1.0"]),
        ("Liger_Kernel_Nightly-1.0.dist-info", OWNED, ["liger-kernel-nightly 1.0"]),
        ("liger_kernel-0.8.4.dist-info", OWNED, ["liger-kernel 0.8.4"]),
        ("liger_kernel-0.8.4.dist-info", (), ["liger-kernel 0.8.4"]),  # what a broken uninstall leaves
        ("liger_kernel_plugin-1.0.dist-info", ("liger_kernel_plugin/__init__.py",), []),
        ("ligerx-1.0.dist-info", OWNED, []),
    ],
)  # fmt: skip
def test_who_shares_the_folder(
    dist_info: str, files: tuple[str, ...], found: list[str], tmp_path: Path
) -> None:
    plant(tmp_path, OURS, *OWNED)
    plant(tmp_path, "torch-2.13.0.dist-info", "torch/__init__.py")
    assert strangers(str(tmp_path), VERSION) == []
    plant(tmp_path, dist_info, *files)
    assert strangers(str(tmp_path), VERSION) == found


def test_no_folder(tmp_path: Path) -> None:
    assert strangers(str(tmp_path / "package.zip"), VERSION) == []


@pytest.mark.parametrize("other", ["", "liger_kernel_nightly-0.8.5.dist-info"])
def test_at_import(other: str, tmp_path: Path) -> None:
    package = Path(liger_kernel.__file__).parent
    for part in ("_core", "compat", "__init__.py"):
        copy = shutil.copytree if (package / part).is_dir() else shutil.copy
        (tmp_path / "liger_kernel").mkdir(exist_ok=True)
        copy(package / part, tmp_path / "liger_kernel" / part)
    plant(tmp_path, OURS, *OWNED)
    if other:
        plant(tmp_path, other, *OWNED)
    program = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import liger_kernel, liger_kernel.compat"
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    said = "pip uninstall -y liger-kernel liger-kernel-nightly && pip install liger-kernel"
    assert done.stderr.count(said) == bool(other)
    assert done.stderr.count("<string>:1: RuntimeWarning") == bool(other)
    assert bool(done.stderr) is bool(other)


def test_costs_one_listing_of_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At every import, beside hundreds of packages: none of them is opened or asked for its metadata."""
    for i in range(500):
        plant(tmp_path, f"package_{i}-1.0.dist-info", f"package_{i}/__init__.py")
    plant(tmp_path, OURS, *OWNED)
    calls: list[str] = []

    def counted(module: ModuleType, name: str) -> None:
        real = getattr(module, name)
        monkeypatch.setattr(
            module, name, lambda *args, **options: (calls.append(name), real(*args, **options))[1]
        )

    for name in ("listdir", "scandir", "stat", "open"):
        counted(os, name)
    counted(builtins, "open")
    found = strangers(str(tmp_path), VERSION)
    monkeypatch.undo()
    assert (found, calls) == ([], ["listdir"])
    plant(tmp_path, "liger_kernel-0.8.4.dist-info", *OWNED)  # what is counted would be seen
    counted(builtins, "open")
    assert strangers(str(tmp_path), VERSION) == ["liger-kernel 0.8.4"]
    assert calls == ["listdir", "open"]
