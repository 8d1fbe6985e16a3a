"""What runs here: the device, its architecture and memory, the communication backend, the version of transformers."""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import importlib.util
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from liger_kernel.backends import amd, intel, nvidia

NPU_ARCHITECTURES = {"910": "ascend910", "310": "ascend310"}

#: name of the backend -> the module with its availability check, in the order of preference
COMMUNICATION_BACKENDS = {
    "nccl": ("torch.distributed", "is_nccl_available"),
    "hccl": ("liger_kernel.utils", "is_npu_available"),
    "xccl": ("torch.distributed", "is_xccl_available"),
    "mpi": ("torch.distributed", "is_mpi_available"),
    "gloo": ("torch.distributed", "is_gloo_available"),
}


def is_peft_available() -> bool:
    return importlib.util.find_spec("peft") is not None


PEFT_AVAILABLE = is_peft_available()


def _runtime(device_type: str) -> Any:
    """`torch.cuda`, `torch.xpu`, or what a vendor's package has put beside them (`torch.npu`)."""
    return getattr(torch, device_type)


def is_npu_available() -> bool:
    """Whether an Ascend NPU can be used: torch_npu imports and sees a device."""
    if importlib.util.find_spec("torch_npu") is None:
        return False
    try:
        importlib.import_module("torch_npu")
        return bool(_runtime("npu").is_available())
    except Exception:  # a broken vendor stack is no NPU, not a crash at import
        return False


def infer_device() -> str:
    """Type of the accelerator of this machine: "cuda", "npu", "xpu" or "cpu"."""
    if torch.cuda.is_available():
        return "cuda"
    if is_npu_available():
        return "npu"
    if torch.xpu.is_available():
        return "xpu"
    return "cpu"


def infer_comm_backend() -> str:
    """Name of the `torch.distributed` backend to use here; RuntimeError if there is none."""
    for name, (module, check) in COMMUNICATION_BACKENDS.items():
        if getattr(importlib.import_module(module), check, bool)():
            return name
    raise RuntimeError("There is no distributed backend available.")


@functools.lru_cache
def infer_device_arch(device_id: int = 0) -> str:
    """Architecture of the accelerator ("hopper", "cdna3", "pvc", ...), or its device type where that is unknown."""
    device = infer_device()
    vendor = "amd" if device == "cuda" and torch.version.hip else device
    try:
        return _ARCHITECTURE_OF[vendor](device_id) or device
    except Exception:  # only a label: a driver that cannot say is no reason to fail
        return device


def _amd_architecture(device_id: int) -> str:
    found = torch.cuda.get_device_properties(device_id)
    return amd.architecture(getattr(found, "gcnArchName", ""))


def _npu_architecture(device_id: int) -> str:
    name = _runtime("npu").get_device_name(device_id)
    return next((arch for part, arch in NPU_ARCHITECTURES.items() if part in name), "npu")


_ARCHITECTURE_OF: dict[str, Callable[[int], str]] = {
    "cuda": lambda device_id: nvidia.architecture(torch.cuda.get_device_capability(device_id)),
    "amd": _amd_architecture,
    "xpu": lambda device_id: intel.architecture(torch.xpu.get_device_name(device_id)),
    "npu": _npu_architecture,
}


def get_total_gpu_memory() -> int:
    """Memory of device 0 in whole GiB; RuntimeError where there is no accelerator."""
    device = infer_device()
    if device == "cpu":
        raise RuntimeError(f"Unsupported device: {device}")
    return _runtime(device).get_device_properties(0).total_memory // 1024**3


def transformers_version_dispatch(
    required_version: str,
    before_fn: Callable[..., Any],
    after_fn: Callable[..., Any],
    before_args: Sequence[Any] = (),
    after_args: Sequence[Any] = (),
    before_kwargs: Mapping[str, Any] | None = None,
    after_kwargs: Mapping[str, Any] | None = None,
) -> Any:
    """Call `before_fn` if the installed transformers is older than `required_version`, else `after_fn`."""
    from packaging.version import Version

    if Version(importlib.metadata.version("transformers")) < Version(required_version):
        return before_fn(*before_args, **(before_kwargs or {}))
    return after_fn(*after_args, **(after_kwargs or {}))
