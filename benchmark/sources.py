"""Which `liger_kernel` this process imports: this tree's, another commit's, or the one of the same name on PyPI.

Import this module before anything of `liger_kernel`: it puts this tree's `src` (or $LIGER_KERNEL_SOURCE, how `--base`
names the worktree of another commit) first on the path.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.machinery
import importlib.metadata
import importlib.util
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "liger_kernel"
SOURCE = os.environ.get("LIGER_KERNEL_SOURCE", str(ROOT / "src"))
sys.path.insert(0, SOURCE)


def has_package(package: str, site: str | None) -> bool:
    """Whether a peer can be imported, without importing it. A peer with our own name must come from `site`."""
    if site is not None and importlib.machinery.PathFinder.find_spec(package, [site]) is not None:
        return True
    return package != PACKAGE and importlib.util.find_spec(package) is not None


def become_peer(package: str, site: str | None) -> Any:
    """From now on `import liger_kernel` finds the package under `site`; what is already imported of ours stays usable.

    Returns: the module `package`.
    """
    for name in list(sys.modules):
        if name.partition(".")[0] == PACKAGE:
            del sys.modules[name]
    sys.meta_path[:] = [
        f for f in sys.meta_path if "__editable__" not in getattr(f, "__module__", "")
    ]
    if site is not None:
        sys.path.insert(0, site)
    importlib.invalidate_caches()
    module = importlib.import_module(package)
    home = Path(str(module.__file__)).resolve()
    if ROOT / "src" in home.parents:
        raise RuntimeError(f"{package} was imported from {home}: that is this tree, not a peer.")
    return module


def peer_environment(site: str) -> dict[str, str]:
    """Environment of a child process whose `liger_kernel` is the one under `site`."""
    others = [
        p
        for p in os.environ.get("PYTHONPATH", "").split(os.pathsep)
        if p and not (Path(p) / PACKAGE).is_dir()
    ]
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(site).resolve()), *others])}


def version(distribution: str) -> str | None:
    """The first installed version on the path, so that of `site` after `become_peer`."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def site_version(site: str | None) -> str | None:
    """Version of the `liger-kernel` under `site`."""
    found = importlib.metadata.distributions(name="liger-kernel", path=[site]) if site else ()
    return next((d.version for d in found), None)


@contextlib.contextmanager
def worktree(ref: str) -> Iterator[Path]:
    """A checkout of another commit in a temporary folder."""
    with tempfile.TemporaryDirectory(prefix="benchmark-base-") as folder:
        path = Path(folder) / "tree"
        command = ["git", "-C", str(ROOT), "worktree"]
        subprocess.run(
            [*command, "add", "--detach", str(path), ref], check=True, stdout=subprocess.DEVNULL
        )
        try:
            yield path
        finally:
            subprocess.run([*command, "remove", "--force", str(path)], check=False)


def commit() -> str:
    """The commit under test, with "-dirty" if files differ from it; $LIGER_KERNEL_COMMIT knows better, if it is set."""

    def git(*args: str) -> str:
        run = ["git", "-C", str(ROOT), *args]
        return subprocess.run(run, check=True, capture_output=True, text=True).stdout.strip()

    if "LIGER_KERNEL_COMMIT" in os.environ:  # a copy of the tree whose .git is older
        return os.environ["LIGER_KERNEL_COMMIT"]
    try:
        changed = git("status", "--porcelain", "--untracked-files=no", "--", "src", "benchmark")
        return git("rev-parse", "HEAD") + ("-dirty" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
