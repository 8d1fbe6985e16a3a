"""Two distributions in one folder: `liger-kernel` and `liger-kernel-nightly` both install into `liger_kernel/`."""

from __future__ import annotations

import os
import warnings

PACKAGE = "liger_kernel"


def strangers(folder: str, version: str) -> list[str]:
    """Other distributions whose files lie in `folder/liger_kernel`, as "name version"; costs a listing of `folder`."""
    try:
        names = os.listdir(folder)
    except OSError:  # a zip archive, or not for us to read
        return []
    found = []
    for entry in sorted(names):
        if entry.lower().replace("-", "_").startswith(PACKAGE) and entry.endswith(".dist-info"):
            name, _, its_version = entry.removesuffix(".dist-info").rpartition("-")
            name = name.lower().replace("_", "-")
            ours = (name, its_version) == ("liger-kernel", version)
            if not ours and _owns(os.path.join(folder, entry)):
                found.append(f"{name} {its_version}")
    return found


def _owns(dist_info: str) -> bool:
    """Whether it installed our `__init__.py`; rare enough to be read."""
    try:
        with open(os.path.join(dist_info, "RECORD"), encoding="utf-8") as record:
            return any(line.startswith(f"{PACKAGE}/__init__.py,") for line in record)
    except OSError:  # left behind by an uninstall that broke off
        return True


def warn_of_strangers(init: str, version: str) -> None:
    """Once, at import: where two distributions share the folder, any module may be the other's."""
    package = os.path.dirname(init)
    others = strangers(os.path.dirname(package), version)
    if others:
        names = " ".join(dict.fromkeys(["liger-kernel", *(o.split()[0] for o in others)]))
        warnings.warn(
            f"{', '.join(others)} and liger-kernel {version} are both installed into {package}: each has overwritten "
            f"files of the other, and uninstalling one breaks the other. Remove them all, then install one: "
            f"pip uninstall -y {names} && pip install liger-kernel",
            RuntimeWarning,
            stacklevel=3,
        )
