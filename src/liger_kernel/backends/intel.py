"""Intel GPUs. Not run by us: their kernels take the configurations measured nowhere."""

from __future__ import annotations

import torch

from liger_kernel.backends.inductor import INDUCTOR
from liger_kernel.backends.records import Backend, DeviceFacts
from liger_kernel.backends.triton import TRITON

#: a part of the lower-case device name -> architecture; the first that fits
ARCHITECTURES = {
    "max": "pvc",
    "pvc": "pvc",
    "ponte": "pvc",
    "arc": "arc",
    "battlemage": "arc",
    "alchemist": "arc",
}


def architecture(device_name: str) -> str:
    name = device_name.lower()
    return next((found for part, found in ARCHITECTURES.items() if part in name), "xpu")


def facts(device: torch.device) -> DeviceFacts:
    found = torch.xpu.get_device_properties(device)
    return DeviceFacts(
        name=found.name,
        architecture=architecture(found.name),
        processors=found.gpu_subslice_count,
        queues=True,
        guard=torch.xpu.device,
    )


BACKEND = Backend("intel", ("xpu",), facts, implementation=TRITON, on_request=(INDUCTOR,))
