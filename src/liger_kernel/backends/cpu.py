"""Processors: the reference computes; on request compiled by Inductor, or kernels under Triton's interpreter."""

from __future__ import annotations

import torch

from liger_kernel.backends.inductor import INDUCTOR
from liger_kernel.backends.records import Backend, ChunkSizes, DeviceFacts
from liger_kernel.backends.triton import TRITON

FACTS = DeviceFacts(
    name="CPU",
    wide_products_are_free=True,
    float64=True,
    # a small head is not worth a slab of many times its size
    chunks=ChunkSizes(fewest_rows=256, fewest_rows_narrow_sum=256, slab_per_weight=1.2),
)


def facts(device: torch.device) -> DeviceFacts:
    return FACTS


BACKEND = Backend("cpu", ("cpu",), facts, on_request=(TRITON, INDUCTOR))
