"""Names that are imported on first use."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable
from typing import Any

#: small things that modules of the incumbent's ops have; here every op has all of them
_HELPERS = (
    "LOG2_E",
    "REDUCTION_LITERAL",
    "TensorDescriptor",
    "get_bucket_m",
    "get_num_warps",
    "silu",
)


def compat_names(
    package: str, names: Iterable[str], home: str = "liger_kernel.compat.ops"
) -> Callable[[str], Any]:
    """`__getattr__` of a package that serves `names` of the incumbent, which `home` defines."""
    served = frozenset(names)

    def get(name: str) -> Any:
        if name in served:
            return getattr(importlib.import_module(home), name)
        if name in _HELPERS:
            return getattr(importlib.import_module("liger_kernel.compat.ops.helpers"), name)
        raise AttributeError(f"module {package!r} has no attribute {name!r}")

    return get
