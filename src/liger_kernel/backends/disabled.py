"""Ops that `liger_kernel selftest` found wrong on a device: a file lists them, and the reference computes them there.

An entry names the device and the versions of torch, triton and this library. It applies to these only, so that an
upgrade of any of them lets it lapse. The file is read when an op first looks for its kernels.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import sys
import tempfile
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

VARIABLE = "LIGER_KERNEL_DISABLED_FILE"
RESET = "`liger_kernel selftest --reset` removes the file, `liger_kernel selftest` tests again."


def path() -> Path:
    given = os.environ.get(VARIABLE)
    if given:
        return Path(given)
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(cache) / "liger_kernel" / "disabled.json"


def our_version() -> str:
    """Not imported: `liger_kernel` itself imports, when it is asked to, what imports this."""
    return str(vars(sys.modules["liger_kernel"])["__version__"])


def _version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return ""


@dataclass(frozen=True)
class Entry:
    """`implementation` computes `op` wrongly on devices named `device`, for the reason `why`."""

    op: str
    implementation: str
    device: str
    why: str
    torch: str
    triton: str
    liger_kernel: str

    @classmethod
    def here(cls, op: str, implementation: str, device: str, why: str) -> Entry:
        """With the versions of this process."""
        versions = (torch.__version__, _version("triton"), our_version())
        return cls(op, implementation, device, why, *versions)

    def applies(self) -> bool:
        """To this installation, on the device that it names."""
        return self == Entry.here(self.op, self.implementation, self.device, self.why)


def read() -> list[Entry]:
    """The entries of the file, lapsed ones too; none where there is no file.

    Raises: ValueError if it cannot be read.
    """
    try:
        text = path().read_text(encoding="utf-8")
        return [Entry(**entry) for entry in json.loads(text or "[]")]
    except (FileNotFoundError, NotADirectoryError):
        return []
    except (OSError, ValueError, TypeError) as error:
        raise ValueError(
            f"{path()}, the list of disabled ops, cannot be read ({error}). `liger_kernel selftest --reset` removes it."
        ) from error


def write(entries: Sequence[Entry]) -> None:
    """Put `entries` in place of the file's, in one step; without any, remove the file."""
    target = path()
    if not entries:
        target.unlink(missing_ok=True)
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps([asdict(entry) for entry in entries], indent=1)
    handle, made = tempfile.mkstemp(dir=target.parent)
    with os.fdopen(handle, "w", encoding="utf-8") as file:
        file.write(text)
    os.replace(made, target)


def reasons(devices: set[str]) -> dict[tuple[str, str], str]:
    """By op and implementation, why it is disabled on one of `devices`; a file that cannot be read is told once."""
    try:
        entries = read()
    except ValueError as error:
        warnings.warn(f"{error} Until then every op is taken to be right.", stacklevel=2)
        return {}
    found = (e for e in entries if e.device in devices and e.applies())
    return {(e.op, e.implementation): f"{e.why} [{e.device}]" for e in found}
