"""Preference, policy and distillation losses on hidden states: the logits of a batch are never held.

`<name>_loss.py` defines `LigerFusedLinear<Name>Loss` and `LigerFusedLinear<Name>Function`, in any capitals. No list
names them: they are found here and in `functional` by the name of the file, and imported on first use.
"""

from __future__ import annotations

import importlib
import pkgutil
from typing import Any


def _losses() -> list[str]:
    """The `<name>` of every loss; imports none of them."""
    files = (module.name for module in pkgutil.iter_modules(__path__))
    return sorted(file.removesuffix("_loss") for file in files if file.endswith("_loss"))


def _class(loss: str, kind: str) -> Any:
    """The "Loss" or the "Function" of `<loss>_loss.py`."""
    file = importlib.import_module(f"{__name__}.{loss}_loss")
    for name, value in vars(file).items():
        if name.lower() == f"ligerfusedlinear{loss}{kind}".replace("_", "").lower():
            return value
    raise ImportError(
        f"{file.__name__} defines no LigerFusedLinear...{kind} with the name of the file."
    )


def __getattr__(name: str) -> Any:
    if name == "__all__":
        return sorted(_class(loss, "Loss").__name__ for loss in _losses())
    for loss in _losses():
        if name.lower() == f"ligerfusedlinear{loss}loss".replace("_", ""):
            return getattr(importlib.import_module(f"{__name__}.{loss}_loss"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__getattr__("__all__")})
