"""The incumbent's autograd Functions and helpers, a file per op: `<op>.py`, that of a family of ops, as `mhc.py` for
`mhc_...`, or `core.py` for the first ones.

A name is served where the incumbent has it, `liger_kernel.ops` and the module of its op, by a row of `ops.SERVED`.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType
from typing import Any

from liger_kernel.ops import SERVED

_HERE = Path(__file__).parent


def module_of(op: str) -> ModuleType:
    """The file that defines the incumbent's names for `op`."""
    files = (op, op.split("_")[0])
    own = next((name for name in files if (_HERE / f"{name}.py").is_file()), "core")
    return importlib.import_module(f"{__name__}.{own}")


def __getattr__(name: str) -> Any:
    for op, names in SERVED.items():
        if name in names:
            return getattr(module_of(op), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
