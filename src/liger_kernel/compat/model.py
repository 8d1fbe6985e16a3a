"""`liger_kernel.transformers.model`, a package of the incumbent; its modules are rows in `compat.ALIASES`."""

from __future__ import annotations

import importlib
from types import ModuleType

from liger_kernel.compat import ALIASES

__path__: list[str] = []
_PACKAGE = "liger_kernel.transformers.model"


def __getattr__(name: str) -> ModuleType:
    """`from liger_kernel.transformers.model import loss_utils` looks under the name of this file."""
    if f"{_PACKAGE}.{name}" in ALIASES:
        return importlib.import_module(f"{_PACKAGE}.{name}")
    raise AttributeError(f"module {_PACKAGE!r} has no attribute {name!r}")
