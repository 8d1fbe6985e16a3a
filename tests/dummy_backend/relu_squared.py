from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from liger_kernel.ops.relu_squared.contract import ReLUSquaredOptions


def forward(
    x: Tensor, *, options: ReLUSquaredOptions, needs: Sequence[bool]
) -> tuple[Tensor, tuple[Tensor]]:
    return x.float().relu().square().to(x.dtype), (x,)


def backward(
    grads: Sequence[Tensor],
    saved: Sequence[Tensor],
    *,
    options: ReLUSquaredOptions,
    needs: Sequence[bool],
) -> tuple[Tensor]:
    x = saved[0]
    return ((2 * x.float().relu() * grads[0].float()).to(x.dtype),)
