"""Add + RMSNorm by `torch_npu.npu_add_rms_norm`; its backward is that of RMSNorm.

Documented in op-plugin as `npu_add_rms_norm(x1, x2, gamma, epsilon=1e-06) -> (y, rstd, x1 + x2)`: of one dtype, gamma
included, and no empty tensors. It has no derivative there.
"""

from __future__ import annotations

from typing import Any

import torch_npu
from torch import Tensor

from liger_kernel._core.contract import Grads, Needs, Saved
from liger_kernel._core.shapes import as_rows
from liger_kernel.backends.npu import no_native_call
from liger_kernel.ops.fused_add_rms_norm.contract import FusedAddRMSNormOptions
from liger_kernel.ops.rms_norm.npu import gamma_of, gradients


def unserved(
    x: Tensor, residual: Tensor | None, weight: Tensor | None, *, options: FusedAddRMSNormOptions
) -> str | None:
    return no_native_call(x)


def forward(
    x: Tensor,
    residual: Any,
    weight: Tensor | None,
    *,
    options: FusedAddRMSNormOptions,
    needs: Needs,
) -> tuple[tuple[Tensor, Tensor], Saved]:
    gamma = gamma_of(x, weight, options.offset)
    if residual is not None and gamma.dtype == x.dtype:
        rows = as_rows(x), as_rows(residual)
        y, rstd, s = torch_npu.npu_add_rms_norm(*rows, gamma, epsilon=options.eps)
        s = s.view(x.shape)
    else:  # RMSNorm alone; it takes a float32 gamma for 16-bit rows
        s = x if residual is None else x + residual
        y, rstd = torch_npu.npu_rms_norm(as_rows(s), gamma, epsilon=options.eps)
    return (y.view(x.shape), s), (s, weight, rstd)


def backward(grads: Any, saved: Any, *, options: FusedAddRMSNormOptions, needs: Needs) -> Grads:
    s, weight, rstd = saved
    dy, ds = grads
    dx, dw = ds, None
    if dy is not None:
        wanted = (needs[0] or needs[1], needs[2])
        dx, dw = gradients(dy, as_rows(s), weight, rstd, options, wanted)
        if dx is not None and ds is not None:
            dx = dx + ds
    return dx if needs[0] else None, dx if needs[1] else None, dw
