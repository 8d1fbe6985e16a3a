"""`liger_kernel.ops.backends._triton` and its modules: ops by their Triton kernels, as `<op>_triton`."""

from __future__ import annotations

from typing import Any

from liger_kernel.compat.dispatch import CALLS, call_of

__path__: list[str] = []


def __getattr__(name: str) -> Any:
    op = name.removesuffix("_triton")
    if op != name and op in CALLS:
        return call_of(op, "triton")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
