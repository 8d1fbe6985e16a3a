"""NVIDIA GPUs."""

from __future__ import annotations

import torch

from liger_kernel.backends.records import SIXTEEN_BITS, Backend, DeviceFacts
from liger_kernel.backends.triton import TRITON

#: compute capability -> architecture; one that is not listed gets the configurations that were measured nowhere
ARCHITECTURES = {
    (7, 0): "volta_turing",
    (7, 5): "volta_turing",
    (8, 0): "ampere_ada",
    (8, 6): "ampere_ada",
    (8, 9): "ampere_ada",
    (9, 0): "hopper",
    (10, 0): "blackwell",
    (10, 3): "blackwell_ultra",
    (12, 0): "blackwell_consumer",
}
#: what this torch multiplies into fp32 on a GPU, here or on paper
MIXED_PRODUCTS = SIXTEEN_BITS if hasattr(torch.ops.aten.addmm, "dtype_out") else ()


def architecture(capability: tuple[int, int]) -> str:
    return ARCHITECTURES.get(capability, f"sm_{capability[0]}{capability[1]}")


def facts(device: torch.device) -> DeviceFacts:
    found = torch.cuda.get_device_properties(device)
    shared_memory = getattr(found, "shared_memory_per_block_optin", 0)
    return described(
        (found.major, found.minor), found.multi_processor_count, shared_memory, found.name
    )


def described(
    capability: tuple[int, int], processors: int, shared_memory: int, name: str = ""
) -> DeviceFacts:
    """The facts of a GPU of which this is known, whether or not it is in this machine."""
    return DeviceFacts(
        name=name,
        architecture=architecture(capability),
        processors=processors,
        shared_memory=shared_memory,
        cluster=8 if capability == (9, 0) else 1,
        queues=True,
        # cuBLAS loads one element at a time where rows are not whole vectors of 16 bytes: 174 instead of 38 ms for a
        # head of 8192x4096x128257 on an H100
        product_multiple=8,
        mixed_products=MIXED_PRODUCTS,
        exact_precision="tf32x3" if capability >= (8, 0) else "ieee",
        streams=torch.cuda,
        graphs=torch.cuda,
        float64=True,
        guard=torch.cuda.device,
    )


#: a card that is not here, for forecasts
ON_PAPER = DeviceFacts(
    name="an NVIDIA GPU",
    architecture="hopper",
    processors=132,
    shared_memory=232_448,
    queues=True,
    product_multiple=8,
    mixed_products=MIXED_PRODUCTS,
)
BACKEND = Backend(
    "nvidia", ("cuda",), facts, implementation=TRITON, present=lambda: torch.version.hip is None
)
