"""Softmax by PyTorch's own operators, for which torch_npu has a kernel each; the output is kept, and not made again."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from liger_kernel._core.contract import Grads, Needs, Saved
from liger_kernel.ops.softmax.contract import SoftmaxOptions
from liger_kernel.ops.softmax.reference import softmax


def forward(x: Tensor, *, options: SoftmaxOptions, needs: Needs) -> tuple[Tensor, Saved]:
    y = softmax(x)
    return y, (y,)


def backward(grads: Any, saved: Any, *, options: SoftmaxOptions, needs: Needs) -> Grads:
    y, dy = saved[0], grads[0]
    return (torch.ops.aten._softmax_backward_data(dy, y, -1, y.dtype),)
