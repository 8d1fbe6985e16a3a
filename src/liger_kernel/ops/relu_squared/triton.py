"""Squared ReLU kernels. Forward moves 2 n elements (x in, y out), backward 3 n (x and dy in, dx out)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from liger_kernel._core.contract import Grads, Needs, Saved
from liger_kernel._core.shapes import cdiv
from liger_kernel.backends.kernels import launch
from liger_kernel.ops.relu_squared.contract import ReLUSquaredOptions


@dataclass(frozen=True)
class Config:
    """One program owns BLOCK elements, the tile that `glu` was measured with."""

    block: int = 4096
    warps: int = 8


@triton.jit
def _positive(x_ptr, n, BLOCK: tl.constexpr):
    """Offsets (64-bit) of this program's elements, their mask, and max(x, 0) in fp32; NaN stays NaN, as in torch."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = at < n
    x = tl.load(x_ptr + at, mask=mask, other=0.0).to(tl.float32)
    return at, mask, tl.where(x < 0, 0.0, x)


@triton.jit
def _relu_squared_fwd(x_ptr, y_ptr, n, BLOCK: tl.constexpr):
    """y = max(x, 0)^2. One program owns BLOCK elements."""
    at, mask, r = _positive(x_ptr, n, BLOCK)
    tl.store(y_ptr + at, (r * r).to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _relu_squared_bwd(x_ptr, dy_ptr, dx_ptr, n, BLOCK: tl.constexpr):
    """dx = 2 max(x, 0) dy. One program owns BLOCK elements."""
    at, mask, r = _positive(x_ptr, n, BLOCK)
    dy = tl.load(dy_ptr + at, mask=mask, other=0.0).to(tl.float32)
    tl.store(dx_ptr + at, (2.0 * r * dy).to(dx_ptr.dtype.element_ty), mask=mask)


def _launch(kernel: triton.JITFunction, x: Tensor, *others: Tensor) -> None:
    config, n = Config(), x.numel()
    if n:
        grid = (cdiv(n, config.block),)
        launch(kernel, grid, x, *others, n, BLOCK=config.block, num_warps=config.warps)


def forward(x: Tensor, *, options: ReLUSquaredOptions, needs: Needs) -> tuple[Tensor, Saved]:
    x = x.contiguous()
    y = torch.empty_like(x)
    _launch(_relu_squared_fwd, x, y)
    return y, (x,)


def backward(grads: Grads, saved: Saved, *, options: ReLUSquaredOptions, needs: Needs) -> Grads:
    (x,) = saved
    dx = torch.empty_like(x)
    _launch(_relu_squared_bwd, x, grads[0].contiguous(), dx)
    return (dx,)
