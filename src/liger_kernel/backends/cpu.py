"""Processors: the reference computes; on request compiled by Inductor, or kernels under Triton's interpreter."""

from __future__ import annotations

import platform
from dataclasses import replace

import torch

from liger_kernel.backends.inductor import INDUCTOR
from liger_kernel.backends.records import Backend, ChunkSizes, DeviceFacts
from liger_kernel.backends.triton import TRITON

FACTS = DeviceFacts(
    name="CPU",
    cluster=8,  # of Triton's interpreter, where one program stands for them
    wide_products_are_free=True,
    float64=True,
    # a small head is not worth a slab of many times its size
    chunks=ChunkSizes(fewest_rows=256, fewest_rows_narrow_sum=256, slab_per_weight=1.2),
)


def multiplies_bfloat16() -> bool:
    """Whether the processor has matrix units for it (AMX, or Arm's BF16), many times as fast as fp32."""
    if platform.machine().lower() in ("aarch64", "arm64"):
        return bool(getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", bool)())
    return bool(getattr(torch.cpu, "_is_amx_tile_supported", bool)())


def facts(device: torch.device) -> DeviceFacts:
    """Products of 16 bits run as eager PyTorch runs them where that is faster; otherwise they need not be rounded."""
    return replace(FACTS, wide_products_are_free=not multiplies_bfloat16())


BACKEND = Backend("cpu", ("cpu",), facts, on_request=(TRITON, INDUCTOR))
