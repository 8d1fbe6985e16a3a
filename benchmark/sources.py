"""Which `liger_kernel` is measured: this tree's, another commit's, or the package of the same name from PyPI."""

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

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "liger_kernel"


def not_ours() -> str | None:
    """Why `import liger_kernel` does not give this tree's, if so."""
    found = importlib.util.find_spec(PACKAGE)
    origin = None if found is None else found.origin
    if origin is not None and ROOT / "src" in Path(origin).resolve().parents:
        return None
    return f"{PACKAGE} would be imported from {origin}, not from {ROOT / 'src'}: set PYTHONPATH=src"


def has_package(package: str, site: str | None) -> bool:
    """Whether a peer can be imported, without importing it. A peer with our own name must come from `site`."""
    if site is not None and importlib.machinery.PathFinder.find_spec(package, [site]) is not None:
        return True
    return package != PACKAGE and importlib.util.find_spec(package) is not None


def become(site: str | None, package: str = PACKAGE) -> None:
    """From now on `import liger_kernel` finds the one under `site`; what is already imported of ours stays usable."""
    for name in list(sys.modules):
        if name.partition(".")[0] == PACKAGE:
            del sys.modules[name]
    sys.meta_path[:] = [
        f for f in sys.meta_path if "__editable__" not in getattr(f, "__module__", "")
    ]
    if site is not None:
        sys.path.insert(0, site)
    importlib.invalidate_caches()
    home = Path(str(importlib.import_module(package).__file__)).resolve()
    if package == PACKAGE and (site is None or Path(site).resolve() not in home.parents):
        raise RuntimeError(f"{package} was imported from {home}, which is not under {site}.")


def version(distribution: str) -> str | None:
    """The first installed version on the path, so that of `site` after `become`."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def site_version(site: str | None) -> str | None:
    """Version of the `liger-kernel` under `site`."""
    found = importlib.metadata.distributions(name="liger-kernel", path=[site]) if site else ()
    return next((d.version for d in found), None)


def is_tree(base: str) -> bool:
    return (Path(base) / "src" / PACKAGE).is_dir()


def is_commit(base: str) -> bool:
    try:
        return bool(_git("rev-parse", "--verify", "--quiet", f"{base}^{{commit}}"))
    except (OSError, subprocess.CalledProcessError):
        return False


@contextlib.contextmanager
def folder_of(name: str, peer_site: str | None, base: str | None) -> Iterator[str | None]:
    """What to put on the path for the provider or mode `name`: `base` is a source tree or a commit, see `--base`."""
    if name != "base" or base is None:
        yield peer_site
    elif is_tree(base):
        yield str(Path(base).resolve() / "src")
    else:
        with tempfile.TemporaryDirectory(prefix="benchmark-base-") as folder:
            archive = Path(folder) / "base.tar"
            _git("archive", f"--output={archive}", base, "src")
            subprocess.run(["tar", "-xf", str(archive), "-C", folder], check=True)
            yield str(Path(folder) / "src")


def commit() -> str:
    """The commit under test, with "-dirty" if files differ from it; $LIGER_KERNEL_COMMIT knows better, if it is set."""
    if "LIGER_KERNEL_COMMIT" in os.environ:  # a copy of the tree whose .git is older
        return os.environ["LIGER_KERNEL_COMMIT"]
    try:
        changed = _git("status", "--porcelain", "--untracked-files=no", "--", "src", "benchmark")
        return _git("rev-parse", "HEAD") + ("-dirty" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _git(*args: str) -> str:
    run = ["git", "-C", str(ROOT), *args]
    return subprocess.run(run, check=True, capture_output=True, text=True).stdout.strip()
