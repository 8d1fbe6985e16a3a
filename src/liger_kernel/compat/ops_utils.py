"""Small helpers that other projects import from here; our own kernels use `liger_kernel.backends`."""

from __future__ import annotations

import functools
import importlib
import operator
from collections.abc import Callable
from typing import Any

import torch

from liger_kernel._core.shapes import next_power_of_2
from liger_kernel.backends import device_guard as device_context
from liger_kernel.utils import infer_device

__all__ = [
    "calculate_settings",
    "compare_version",
    "device_context",
    "ensure_contiguous",
    "get_amp_custom_fwd_bwd",
    "get_npu_core_count",
    "infer_device",
    "is_hip",
    "set_large_grf_mode",
]

MAX_FUSED_SIZE = 65536


def is_hip() -> bool:
    return torch.version.hip is not None


def ensure_contiguous(fn: Callable[..., Any]) -> Callable[..., Any]:
    """Decorate `fn(ctx, *args, **kwargs)` so that it receives contiguous tensors."""

    def contiguous(value: Any) -> Any:
        return value.contiguous() if isinstance(value, torch.Tensor) else value

    @functools.wraps(fn)
    def wrapper(ctx: Any, *args: Any, **kwargs: Any) -> Any:
        return fn(ctx, *map(contiguous, args), **{k: contiguous(v) for k, v in kwargs.items()})

    return wrapper


def calculate_settings(n: int) -> tuple[int, int]:
    """(block size, warps) of a kernel that holds a row of n elements in one block; RuntimeError above 65536."""
    block = next_power_of_2(n)
    if block > MAX_FUSED_SIZE:
        raise RuntimeError(
            f"A row of {n} elements needs a block of {block}; the limit is {MAX_FUSED_SIZE}."
        )
    if block >= 32768:
        return block, 16 if is_hip() else 32
    return block, 16 if block >= 8192 else 8 if block >= 2048 else 4


def compare_version(package: str, operator: Callable[[Any, Any], bool], target: str) -> bool:
    """`operator(version of the importable package, target)`; False if it cannot be imported."""
    from packaging.version import Version

    try:
        module = importlib.import_module(package)
    except ImportError:
        return False
    return operator(Version(module.__version__), Version(target))


def get_npu_core_count(default: int = 20) -> int:
    """Vector cores of this machine's NPU, as the Triton for it says; `default` where there is none."""
    try:
        driver = importlib.import_module("triton.runtime").driver.active
        device = torch.npu.current_device()  # type: ignore[attr-defined]
        return int(driver.utils.get_device_properties(device)["num_vectorcore"])
    except Exception:  # whatever a driver, or its absence, raises
        return default


def set_large_grf_mode(kernel_args: dict[str, Any]) -> None:
    """Let a kernel on an Intel GPU have 256 registers, in the words of the Triton that is installed."""
    kernel_args["grf_mode"] = "256" if compare_version("triton", operator.ge, "3.6.0") else "large"


def get_amp_custom_fwd_bwd() -> tuple[Callable[..., Any], Callable[..., Any]]:
    """`torch.amp.custom_fwd` and `custom_bwd` for the device of this machine."""
    device = infer_device()
    return (
        functools.partial(torch.amp.custom_fwd, device_type=device),
        functools.partial(torch.amp.custom_bwd, device_type=device),
    )


def __getattr__(name: str) -> Any:
    """Made on first use: these import triton, or look for accelerators."""
    if name == "torch_to_triton_dtype":
        import triton.language as tl

        return {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}
    if name == "element_mul_kernel":
        from liger_kernel.compat.ops import kernels

        return kernels.element_mul_kernel
    if name in ("amp_custom_fwd", "amp_custom_bwd"):
        return get_amp_custom_fwd_bwd()[name == "amp_custom_bwd"]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
