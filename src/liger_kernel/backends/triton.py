"""Triton: NVIDIA and AMD GPUs ("cuda"), Intel GPUs ("xpu"), and the CPU under Triton's interpreter."""

from __future__ import annotations

import importlib.util

from liger_kernel._core.launch import INTERPRET

#: served without being asked; the interpreted CPU only on request
DEVICE_TYPES = ("cuda", "xpu")


def unavailable(device_type: str) -> str | None:
    """Why this backend cannot serve `device_type`; None if it can."""
    if device_type == "cpu" and not INTERPRET:
        return "Triton runs on the CPU only under TRITON_INTERPRET=1"
    if device_type not in (*DEVICE_TYPES, "cpu"):
        return f"Triton supports {' and '.join(DEVICE_TYPES)}"
    if importlib.util.find_spec("triton") is None:
        return "the package 'triton' is not installed"
    return None
