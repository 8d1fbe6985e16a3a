"""Ascend NPUs: PyTorch's device for vendors (PrivateUse1), which the package `torch_npu` registers as "npu".

Never run by us on silicon. What is known of the functions of `torch_npu` is their documentation, op-plugin's
`docs/zh/custom_APIs/torch_npu` (https://gitcode.com/Ascend/op-plugin), and `docs/npu.md` says what was tested.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor

from liger_kernel.backends.records import Backend, DeviceFacts, Implementation

#: what `LabelCount` and graph capture ask of a module of streams
_STREAMS = ("Stream", "stream", "current_stream", "is_current_stream_capturing")


def facts(device: torch.device) -> DeviceFacts:
    runtime: Any = torch.npu  # type: ignore[attr-defined]
    return DeviceFacts(
        name=runtime.get_device_name(device),
        queues=True,
        small_by_torch=False,  # `F.rms_norm` is six operators there, `npu_rms_norm` is one
        streams=runtime if all(hasattr(runtime, name) for name in _STREAMS) else None,
        guard=runtime.device,
    )


def unavailable(device_type: str) -> str | None:
    """Why torch_npu cannot serve `device_type`; None if it can."""
    if device_type != "npu":
        return "torch_npu computes on npu devices"
    try:
        importlib.import_module("torch_npu")
    except ModuleNotFoundError as error:
        if error.name == "torch_npu":
            return "the package 'torch_npu' is not installed"
        return f"the package 'torch_npu' cannot be imported, since {error.name!r} is not installed"
    except Exception as error:  # its libraries need those of the driver
        return f"the package 'torch_npu' cannot be imported: {type(error).__name__}: {error}"
    return None


def no_native_call(*tensors: Tensor | None) -> str | None:
    """Why no function of torch_npu takes these tensors, whatever the op; None if one may."""
    if any(t is not None and t.numel() == 0 for t in tensors):
        return "the functions of torch_npu take no empty tensors"
    return None


BACKEND = Backend("npu", ("npu",), facts, implementation=Implementation("npu", unavailable))
