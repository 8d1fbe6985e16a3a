"""LayerNorm by PyTorch's own operators, for which torch_npu has a kernel each: `native_layer_norm` and its backward."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from liger_kernel._core.contract import Grads, Needs, Saved
from liger_kernel.backends.npu import no_native_call
from liger_kernel.ops.layer_norm.contract import LayerNormOptions


def unserved(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, *, options: LayerNormOptions
) -> str | None:
    if x.dtype.itemsize > 2:
        return "how its float32 statistics are taken is not documented"
    if any(p is not None and p.dtype != x.dtype for p in (weight, bias)):
        return "weight or bias have another dtype than x"
    return no_native_call(x)


def forward(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    *,
    options: LayerNormOptions,
    needs: Needs,
) -> tuple[Tensor, Saved]:
    x = x.contiguous()
    y, mean, rstd = torch.native_layer_norm(x, x.shape[-1:], weight, bias, options.eps)
    return y, (x, weight, bias, mean, rstd)


def backward(grads: Any, saved: Any, *, options: LayerNormOptions, needs: Needs) -> Grads:
    x, weight, bias, mean, rstd = saved
    dy, shape = grads[0].contiguous(), x.shape[-1:]
    return torch.ops.aten.native_layer_norm_backward(
        dy, x, shape, mean, rstd, weight, bias, list(needs)
    )
