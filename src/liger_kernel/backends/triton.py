"""The op files `triton.py`: on GPUs, and on the CPU under Triton's interpreter. Shared by the backends beside this."""

from __future__ import annotations

import importlib.util
import os

from liger_kernel.backends.records import Implementation

#: kernels run in Python, on tensors of the CPU
INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE_TYPES = ("cuda", "xpu")


def unavailable(device_type: str) -> str | None:
    """Why Triton cannot serve `device_type`; None if it can."""
    if device_type == "cpu" and not INTERPRET:
        return "Triton runs on the CPU only under TRITON_INTERPRET=1"
    if device_type not in (*DEVICE_TYPES, "cpu"):
        return f"Triton supports {' and '.join(DEVICE_TYPES)}"
    if importlib.util.find_spec("triton") is None:
        return "the package 'triton' is not installed"
    return None


TRITON = Implementation("triton", unavailable)
