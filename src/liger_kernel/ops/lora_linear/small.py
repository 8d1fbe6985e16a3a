"""Linears with adapters of few tokens: what the host has to do is the bound, and so the node is as short as can be.

No gradients that meet, nothing left out of what is kept, no kernels: each of these saves a GPU time or memory, and
takes the host longer. Linears that read the same input are one node all the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from liger_kernel._core.autograd import autocast_dtype, refuse_double_backward
from liger_kernel._core.shapes import as_rows, in_dtype
from liger_kernel.backends import host_bound

#: elements of x, or of what is made of it, up to which the host is the bound on a GPU, as for a gated MLP
#: (`ops/gated_mlp`). Seven Linears of a layer of Qwen3-0.6B, r 16, 4 x 512 tokens, from the host on an H200 machine,
#: forward and backward: 2.2 ms by PEFT, 1.8 by `addmm` of PyTorch's autograd, 1.6 by a node for each, 1.4 by these.
SMALL = 2**23


class Adapter(NamedTuple):
    """lora_a: (r, H). lora_b: (O, r). dropped: what it reads in the place of x, where a dropout lies before it."""

    lora_a: Tensor
    lora_b: Tensor
    scaling: float
    dropped: Tensor | None = None


#: weight, bias and adapters, each an `Adapter` or its fields in that order
Layer = tuple[Any, Tensor | None, Sequence[Any]]


def serves(x: Tensor, *layers: Layer) -> bool:
    """Whether `adapted` computes these layers of x: few tokens, frozen tensors in the dtype of the products."""
    if not host_bound(x, SMALL):
        return False
    dtype, tokens = autocast_dtype(x) or x.dtype, x.numel() // max(1, x.shape[-1])
    for weight, bias, _ in layers:
        if not isinstance(weight, Tensor) or weight.requires_grad or weight.dtype != dtype:
            return False
        if bias is not None and (bias.requires_grad or bias.dtype != dtype):
            return False
        if tokens * weight.shape[0] > SMALL:
            return False
    return True


def adapted(x: Tensor, *layers: Layer) -> tuple[Tensor, ...]:
    """For each layer `x @ weight.T + bias + scaling * (read @ lora_a.T) @ lora_b.T` (..., O), of tensors that fit."""
    flat = [t for _, _, adapters in layers for a in adapters for t in (a[0], a[1], a[3])]
    found: tuple[Tensor, ...] = _Small.apply((layers, autocast_dtype(x)), x, *flat)
    return found


class _Small(torch.autograd.Function):
    """options: the layers, and the dtype of autocast. Then x, and (A, B, dropped) of each adapter."""

    @staticmethod
    def forward(ctx: Any, options: Any, x: Tensor, *flat: Any) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        layers, autocast = options
        x = x if autocast is None else in_dtype(x, autocast)
        rows = as_rows(x)
        ys, middles = [], []
        for weight, bias, adapters in layers:
            y = rows.new_empty(*x.shape[:-1], weight.shape[0])  # no view: HF may change it in place
            flat_y = y.view(-1, y.shape[-1])
            if bias is None:
                torch.mm(rows, weight.t(), out=flat_y)
            else:
                torch.addmm(bias, rows, weight.t(), out=flat_y)
            for a, b, scaling, dropped in adapters:
                wide = autocast or a.dtype
                read = in_dtype(rows if dropped is None else as_rows(dropped), wide)
                middle = read.mm(in_dtype(a, wide).t())  # (T, r)
                middles.append(middle)
                if wide.itemsize > y.itemsize:
                    flat_y.copy_(torch.addmm(flat_y.to(wide), middle, b.t(), alpha=scaling))
                else:
                    thin = in_dtype(middle, y.dtype), in_dtype(b, y.dtype).t()
                    flat_y.addmm_(*thin, alpha=scaling)
            ys.append(y)
        ctx.of_forward = layers, x.shape
        ctx.save_for_backward(rows if True in ctx.needs_input_grad[2::3] else None, *flat, *middles)
        return tuple(ys)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        refuse_double_backward()
        layers, shape = ctx.of_forward
        rows, *saved = ctx.saved_tensors
        needs = ctx.needs_input_grad[2:]
        found: list[Tensor | None] = [None] * len(needs)
        dx, at = None, 0
        for (weight, _, adapters), grad in zip(layers, grads, strict=True):
            if grad is None:
                at += 3 * len(adapters)
                continue
            dy = as_rows(grad)
            if ctx.needs_input_grad[1]:
                dx = dy.mm(weight) if dx is None else dx.addmm_(dy, weight)
            for adapter in adapters:
                a, b, dropped = saved[at : at + 3]
                middle = saved[len(needs) + at // 3]
                wide = in_dtype(dy, middle.dtype)
                a, b = in_dtype(a, wide.dtype), in_dtype(b, wide.dtype)
                # with beta 0 nothing is read of the first, which has the shape: a call less than to scale a product
                alpha = adapter.scaling
                inner = torch.addmm(middle, wide, b, beta=0, alpha=alpha)  # (T, r)
                if needs[at]:
                    read = rows if dropped is None else as_rows(dropped)
                    found[at] = inner.t().mm(in_dtype(read, wide.dtype))
                if needs[at + 1]:
                    found[at + 1] = torch.addmm(b, wide.t(), middle, beta=0, alpha=alpha)
                if needs[at + 2]:
                    found[at + 2] = inner.mm(a).view(shape)
                elif dropped is None and dx is not None:
                    dx.addmm_(in_dtype(inner, dx.dtype), in_dtype(a, dx.dtype))
                at += 3
        return None, None if dx is None else dx.view(shape), *found
