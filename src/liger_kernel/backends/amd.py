"""AMD GPUs, which torch calls "cuda". Not run by us: their kernels take the configurations measured nowhere."""

from __future__ import annotations

import torch

from liger_kernel.backends.records import Backend, DeviceFacts
from liger_kernel.backends.triton import TRITON

#: start of the compiler's name -> architecture
ARCHITECTURES = {
    "gfx908": "cdna",
    "gfx90a": "cdna2",
    "gfx940": "cdna3",
    "gfx941": "cdna3",
    "gfx942": "cdna3",
    "gfx1100": "rdna3",
    "gfx1101": "rdna3",
    "gfx1102": "rdna3",
    "gfx1103": "rdna3",
    "gfx1150": "rdna3.5",
    "gfx1151": "rdna3.5",
    "gfx1200": "rdna4",
    "gfx1201": "rdna4",
}


def architecture(compiler_name: str) -> str:
    name = compiler_name.split(":")[0]
    return ARCHITECTURES.get(name, name)


def facts(device: torch.device) -> DeviceFacts:
    found = torch.cuda.get_device_properties(device)
    wavefront = getattr(found, "warp_size", 64)
    return described(
        getattr(found, "gcnArchName", ""), found.multi_processor_count, wavefront, found.name
    )


def described(compiler_name: str, processors: int, wavefront: int, name: str = "") -> DeviceFacts:
    """The facts of a GPU of which this is known, whether or not it is in this machine."""
    return DeviceFacts(
        name=name,
        architecture=architecture(compiler_name),
        processors=processors,
        most_warps=1024 // wavefront,
        queues=True,
        product_multiple=8,
        streams=torch.cuda,
        graphs=torch.cuda,
        float64=True,
        guard=torch.cuda.device,
    )


BACKEND = Backend(
    "amd", ("cuda",), facts, implementation=TRITON, present=lambda: torch.version.hip is not None
)
