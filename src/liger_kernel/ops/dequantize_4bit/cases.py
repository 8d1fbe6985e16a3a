"""Weights of 4 bits for tests and benchmarks."""

from __future__ import annotations

from typing import Any

import torch

from liger_kernel._core.shapes import cdiv
from liger_kernel.ops.dequantize_4bit import dequantize_4bit, reference
from liger_kernel.testing import Inputs, Make, OpCase, OpSpec, case


def of(n: int, blocksize: int, nested: int = 0, offset: bool = True, gaps: bool = False) -> Inputs:
    """`nested`: how many absmax have one scale."""

    def inputs(make: Make) -> Any:
        packed = make.integers(256, cdiv(n, 2) * (2 if gaps else 1)).to(torch.uint8)
        code, n_blocks = make.randn(16), cdiv(n, blocksize)
        packed = packed[::2] if gaps else packed
        if not nested:
            return packed, code, make.randn(n_blocks).abs(), None, None, None
        absmax = make.integers(256, n_blocks).to(torch.uint8)
        scale, shift = make.randn(cdiv(n_blocks, nested)).abs(), make.randn()
        return packed, code, absmax, make.randn(256), scale, shift if offset else None

    return inputs


def _case(id: str, why: str, shape: tuple[int, ...], blocksize: int = 64, **how: Any) -> OpCase:
    n, nested = torch.Size(shape).numel(), how.get("nested", 0)
    drawn = {name: how.pop(name) for name in ("nested", "offset", "gaps") if name in how}
    return case(
        id,
        why,
        of(n, blocksize, **drawn),
        shape=shape,
        dtype=how.pop("dtype", None),
        blocksize=blocksize,
        absmax_blocksize=nested or 256,
        **how,
    )


def _reference(*tensors: Any, **options: Any) -> Any:
    options["dtype"] = options["dtype"] or tensors[1].dtype
    return reference.dequantize_4bit(*tensors, **options)


CASES = (
    _case("nested", "two programs, the second one partly masked", (72, 64), nested=4),
    _case("plain", "one scale each", (24, 64)),
    _case("short-block", "the last block is not full, the last byte half", (3, 41)),
    _case("small-block", "", (5, 96), blocksize=32, nested=2, offset=False),
    _case("large-block", "a block is more than a program has bytes", (3, 4096), blocksize=8192),
    _case("gaps", "packed bytes that are not contiguous", (6, 64), gaps=True),
    _case("into-bf16", "another dtype than that of the code", (5, 64), dtype=torch.bfloat16),
    _case("empty", "", (0, 64)),
    _case("4096x14336", "an MLP of Llama-3-8B", (4096, 14336), nested=256, large=True),
    _case("4096x4096", "o_proj of Llama-3-8B", (4096, 4096), nested=256, large=True),
)
SPEC = OpSpec(
    name="dequantize_4bit",
    function=dequantize_4bit,
    reference=_reference,
    cases=CASES,
    differentiable=(),
    traffic=(5, (0,)),  # of bytes: one in, two elements of 16 bits out
)
