"""Kernels with a fault each, to see that the proof finds it. Imported by its workers only."""

from __future__ import annotations

import os
from typing import Any

import torch
import triton
import triton.language as tl

from liger_kernel.testing import OpSpec, case


@triton.jit
def _sound(x_ptr, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.store(x_ptr + at, tl.load(x_ptr + at) * 2)


@triton.jit
def _hoards(x_ptr, BLOCK: tl.constexpr):
    """A factor of a product of matrices passes through shared memory: 128 KiB."""
    rows, cols = tl.arange(0, 64), tl.arange(0, BLOCK)
    left = tl.load(x_ptr + rows[:, None] * BLOCK + cols[None, :]).to(tl.float16)
    right = tl.load(x_ptr + cols[:, None] * 64 + rows[None, :]).to(tl.float16)
    product = tl.dot(left, right)
    tl.store(x_ptr + rows[:, None] * 64 + rows[None, :], product.to(x_ptr.dtype.element_ty))


@triton.jit
def _spills(x_ptr, BLOCK: tl.constexpr):
    """A warp keeps a row, of which each thread has more than it is allowed registers."""
    at = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + at).to(tl.float32)
    tl.store(x_ptr + at, (x / tl.sum(x)).to(x_ptr.dtype.element_ty))


@triton.jit
def _lacks(x_ptr, BLOCK: tl.constexpr):
    """`tanh` of two bfloat16 at once is an instruction of sm_90 and later, and of no AMD GPU."""
    at = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + at).to(tl.int32)
    y = tl.inline_asm_elementwise(
        "tanh.approx.bf16x2 $0, $1;", "=r,r", [x], dtype=tl.int32, is_pure=True, pack=1
    )
    tl.store(x_ptr + at, y.to(x_ptr.dtype.element_ty))


@triton.jit
def _adds_atomically(x_ptr, BLOCK: tl.constexpr):
    tl.atomic_add(x_ptr + tl.arange(0, BLOCK), 1.0)


@triton.jit
def _is_no_triton(x_ptr, BLOCK: tl.constexpr):
    tl.store(x_ptr + tl.arange(0, BLOCK), tl.arange(0, BLOCK + 1))


@tl.core.builtin
def _exit(_semantic=None):
    os._exit(3)


@triton.jit
def _ends_its_process(x_ptr, BLOCK: tl.constexpr):
    _exit()


@triton.jit
def _idle(x_ptr):
    """No case launches it."""


FEW_REGISTERS = {"waves_per_eu": 8} if torch.version.hip else {"maxnreg": 32}
KERNELS: dict[str, tuple[Any, dict[str, int]]] = {
    "sound": (_sound, {"BLOCK": 1024}),
    "hoards": (_hoards, {"BLOCK": 1024, "num_warps": 16}),
    "spills": (_spills, {"BLOCK": 8192, "num_warps": 1, **FEW_REGISTERS}),
    "lacks": (_lacks, {"BLOCK": 1024}),
    "adds_atomically": (_adds_atomically, {"BLOCK": 1024}),
    "ends_its_process": (_ends_its_process, {"BLOCK": 1024}),
    "is_no_triton": (_is_no_triton, {"BLOCK": 1024}),
}


def specs() -> dict[str, OpSpec]:
    found = {}
    for name, (kernel, constants) in KERNELS.items():

        def launch(x: Any, kernel: Any = kernel, constants: Any = constants) -> Any:
            kernel[(1,)](x, **constants)
            return x

        cases = (case("only", name, lambda make: (make.randn(1024),)),)
        found[name] = OpSpec(name, launch, torch.clone, cases, differentiable=())
    return found
