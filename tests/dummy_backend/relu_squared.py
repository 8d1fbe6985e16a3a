from __future__ import annotations

from torch import Tensor

from liger_kernel._core.contract import Grads, Needs, Saved
from liger_kernel.ops.relu_squared.contract import ReLUSquaredOptions


def forward(x: Tensor, *, options: ReLUSquaredOptions, needs: Needs) -> tuple[Tensor, Saved]:
    return x.float().relu().square().to(x.dtype), (x,)


def backward(grads: Grads, saved: Saved, *, options: ReLUSquaredOptions, needs: Needs) -> Grads:
    x = saved[0]
    return ((2 * x.float().relu() * grads[0].float()).to(x.dtype),)
