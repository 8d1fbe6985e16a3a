"""`liger_kernel.transformers.model`, a package whose modules are rows in `compat.ALIASES` or in `forwards`."""

from __future__ import annotations

import importlib
from types import ModuleType

from liger_kernel.compat import ALIASES
from liger_kernel.compat.forwards import FORWARDS, PACKAGE

__path__: list[str] = []


def __getattr__(name: str) -> ModuleType:
    """`from liger_kernel.transformers.model import loss_utils` looks under the name of this file."""
    if name in FORWARDS or f"{PACKAGE}.{name}" in ALIASES:
        return importlib.import_module(f"{PACKAGE}.{name}")
    raise AttributeError(f"module {PACKAGE!r} has no attribute {name!r}")
