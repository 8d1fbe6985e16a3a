"""The losses as functions: positional arguments in the order of the incumbent.

`liger_fused_linear_<name>` is the `apply` of the function class in `<name>_loss.py`, which is served here, too.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

from liger_kernel import chunked_loss

_PREFIX = "liger_fused_linear_"
_SHORT = {"cosine_similarity": "cosine"}


def __getattr__(name: str) -> Any:
    if name == "__all__":
        return [_PREFIX + _SHORT.get(loss, loss) for loss in chunked_loss._losses()]
    for loss in chunked_loss._losses():
        if name == _PREFIX + _SHORT.get(loss, loss):
            return chunked_loss._class(loss, "Function").apply
        if name.lower() == f"ligerfusedlinear{loss}function".replace("_", ""):
            return getattr(import_module(f"{chunked_loss.__name__}.{loss}_loss"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__getattr__("__all__")})
