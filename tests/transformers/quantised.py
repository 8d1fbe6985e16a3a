"""A stand-in for bitsandbytes' Linear4bit, for machines without it: the same attributes, layout and arithmetic."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from liger_kernel.ops.dequantize_4bit import dequantize_4bit

#: NF4: quantiles of a normal distribution (QLoRA, appendix E)
NF4 = (
    *(-1.0, -0.6961928, -0.5250731, -0.3949175, -0.2844414, -0.1847734, -0.0910500, 0.0),
    *(0.0795803, 0.1609302, 0.2461123, 0.3379152, 0.4407098, 0.5626170, 0.7229568, 1.0),
)


class Params4bit(nn.Parameter):
    quant_state: Any

    def __deepcopy__(self, memo: dict[int, Any]) -> Params4bit:
        copied = Params4bit(self.data.clone(), requires_grad=False)
        copied.quant_state = copy.deepcopy(self.quant_state, memo)
        return copied


def blocks(values: Tensor, size: int) -> Tensor:
    flat = values.flatten().float()
    return F.pad(flat, (0, -flat.numel() % size)).view(-1, size)


def quantise(weight: Tensor, nested: bool, blocksize: int) -> Params4bit:
    code = torch.tensor(NF4, device=weight.device)
    parted = blocks(weight, blocksize)
    absmax = parted.abs().amax(1)
    edges = (code[1:] + code[:-1]) / 2
    indices = torch.bucketize(parted / absmax[:, None].clamp(min=1e-30), edges).to(torch.uint8)
    indices = indices.flatten()[: weight.numel() + weight.numel() % 2].view(-1, 2)
    state = SimpleNamespace(
        quant_type="nf4", code=code, blocksize=blocksize, dtype=weight.dtype, shape=weight.shape
    )
    state.absmax, state.nested, state.state2, state.offset = absmax, nested, None, None
    if nested:
        state.offset = absmax.mean()
        table = torch.linspace(-1, 1, 256, device=weight.device)
        parted = blocks(absmax - state.offset, 256)
        scale = parted.abs().amax(1)
        found = ((parted / scale[:, None] + 1) * 127.5).round().flatten()[: absmax.numel()]
        state.absmax = found.to(torch.uint8)
        state.state2 = SimpleNamespace(
            absmax=scale, code=table, blocksize=256, dtype=torch.float32, nested=False
        )
    packed = (indices[:, 0] << 4 | indices[:, 1])[:, None]
    param = Params4bit(packed, requires_grad=False)
    param.quant_state = state
    return param


def dequantised(weight: Any, dtype: torch.dtype) -> Tensor:
    state, inner = weight.quant_state, weight.quant_state.state2
    scales = (None, None, None) if inner is None else (inner.code, inner.absmax, state.offset)
    return dequantize_4bit(
        weight.data,
        state.code,
        state.absmax,
        *scales,
        shape=state.shape,
        dtype=dtype,
        blocksize=state.blocksize,
    )


class _MatMul4bit(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Any, bias: Tensor | None) -> Tensor:
        ctx.weight = weight
        return F.linear(x, dequantised(weight, x.dtype), bias)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return grads[0] @ dequantised(ctx.weight, grads[0].dtype), None, None


class Linear4bit(nn.Linear):
    """Made of a Linear, whose weight it quantises."""

    def __init__(
        self,
        linear: nn.Linear,
        compute_dtype: torch.dtype | None,
        nested: bool = True,
        blocksize: int = 64,
    ):
        with torch.device("meta"):
            super().__init__(linear.in_features, linear.out_features, linear.bias is not None)
        self.weight: Any = quantise(linear.weight.data, nested, blocksize)
        self.bias = linear.bias
        self.compute_dtype = compute_dtype
        self.compute_type_is_set = compute_dtype is not None

    def forward(self, x: Tensor) -> Tensor:
        if not self.compute_type_is_set:
            self.compute_dtype, self.compute_type_is_set = x.dtype, True
        bias = None if self.bias is None else self.bias.to(self.compute_dtype)
        found: Tensor = _MatMul4bit.apply(x.to(self.compute_dtype), self.weight, bias)
        return found.to(x.dtype)
