"""Which package answers to `import liger_kernel`, and what else of that name is installed."""

from __future__ import annotations

import importlib.metadata
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from liger_kernel.backends.disabled import our_version

DISTRIBUTION = "liger-kernel"
#: files of the package of the same name by others, which ours has not
_THEIRS = (
    "ops/rms_norm.py",
    "ops/cross_entropy.py",
    "transformers/rms_norm.py",
    "triton/__init__.py",
)


def version_of(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


@dataclass(frozen=True)
class Other:
    """`what` of the name liger_kernel that is not this package, `where`, and `how` the two meet."""

    what: str
    where: str
    how: str


def ours() -> Path:
    return Path(__file__).resolve().parents[1]


def others() -> Iterator[Other]:
    """Packages and metadata of others under our names."""
    if any((ours() / file).is_file() for file in _THEIRS):
        yield Other("files of another package", str(ours()), "mixed with ours in one folder")
    before = True
    for entry in dict.fromkeys(Path(entry or ".").resolve() for entry in sys.path):
        found = entry / "liger_kernel"
        if found == ours():
            before = False
        elif (found / "__init__.py").is_file():
            how = (
                "shadows ours where a process starts with this path"
                if before
                else "shadowed by ours"
            )
            yield Other("another liger_kernel", str(found), how)
    for distribution in importlib.metadata.distributions(name=DISTRIBUTION):
        if distribution.version != our_version():
            yield Other(
                f"{DISTRIBUTION} {distribution.version}",
                str(distribution.locate_file("")),
                "what pip and frameworks read as our version",
            )
