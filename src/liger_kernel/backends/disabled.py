"""Ops that `liger_kernel selftest` found wrong on a device: a file lists them, and the reference computes them there.

An entry names the device and the versions of torch, triton and this library. It applies to these only, so that an
upgrade of any of them lets it lapse. The file is read when an op first looks for its kernels. A path that is there and
is no regular file, such as /dev/null, lists nothing, and nothing is written there.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import sys
import tempfile
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch

VARIABLE = "LIGER_KERNEL_DISABLED_FILE"
_REMOVES = "`liger_kernel selftest --reset` removes it."
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


class Unreadable(ValueError):
    """The file is there and cannot be read: `text` says why."""

    def __init__(self, why: object, way_out: str) -> None:
        self.text = f"{path()}, the list of disabled ops, cannot be read ({why})"
        self.way_out = way_out
        super().__init__(f"{self.text}. {way_out}")


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

    Raises: Unreadable, a ValueError, if it cannot be read.
    """
    try:
        target = path()
        if not (target.is_file() or target.is_dir()):
            return []
        found = json.loads(target.read_text(encoding="utf-8") or "[]")
    except FileNotFoundError:  # removed since
        return []
    except OSError as error:
        raise Unreadable(error, f"{VARIABLE} names another file.") from error
    except (ValueError, RecursionError) as error:
        raise Unreadable(error, _REMOVES) from error
    if not isinstance(found, list) or not all(map(_is_entry, found)):
        raise Unreadable("it is no list of ops as `liger_kernel selftest` writes it", _REMOVES)
    return [Entry(**entry) for entry in found]


def _is_entry(found: Any) -> bool:
    return (
        isinstance(found, dict)
        and found.keys() == {field.name for field in fields(Entry)}
        and all(isinstance(value, str) for value in found.values())
    )


def write(entries: Sequence[Entry]) -> None:
    """Put `entries` in place of the file's, in one step; without any, remove the file.

    Raises: OSError where that cannot be done.
    """
    target = path()
    if not entries:
        if target.is_file():
            target.unlink(missing_ok=True)
        return
    if target.exists() and not target.is_file():  # a device would be gone, and a file in its place
        raise FileExistsError("it is no regular file")
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
