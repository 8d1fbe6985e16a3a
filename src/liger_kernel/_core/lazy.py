"""Names that are imported on first use."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable
from typing import Any


def compat_names(package: str, names: Iterable[str]) -> Callable[[str], Any]:
    """`__getattr__` of a package that serves `names` of the incumbent, which `liger_kernel.compat.ops` defines."""
    served = frozenset(names)

    def get(name: str) -> Any:
        if name in served:
            return getattr(importlib.import_module("liger_kernel.compat.ops"), name)
        raise AttributeError(f"module {package!r} has no attribute {name!r}")

    return get
