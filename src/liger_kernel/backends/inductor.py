"""The references, each compiled by Inductor as one function: for devices without kernels of ours, on request.

On request only: the first call of each op and dtype compiles for seconds, and for processors needs a C++ compiler.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from typing import Any

import torch

from liger_kernel.backends.records import Implementation


@functools.cache
def unavailable(device_type: str) -> str | None:
    """Why Inductor cannot serve `device_type`; None if it can."""
    if device_type == "cpu":
        from torch._inductor import cpp_builder, exc

        try:
            cpp_builder.get_cpp_compiler()
        except exc.InvalidCxxCompiler as error:
            return f"Inductor finds no C++ compiler: {error}"
    elif device_type == "xpu" and importlib.util.find_spec("triton") is None:
        return "the package 'triton' is not installed"
    elif device_type not in ("mps", "xpu"):
        return "our kernels, or those of its vendor, serve this device"
    return None


@functools.cache
def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(function)


INDUCTOR = Implementation("inductor", unavailable, compiled=compiled)
