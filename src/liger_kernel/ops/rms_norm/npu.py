"""RMSNorm by `torch_npu.npu_rms_norm` and `npu_rms_norm_backward`.

Documented in op-plugin as `npu_rms_norm(self, gamma, epsilon=1e-06) -> (y, rstd)`: gamma has the dtype of self, or is
float32 for 16-bit tensors; y is computed in float32 and rounded once, rstd is float32. Its derivative is declared in
op-plugin's `derivatives.yaml` as `npu_rms_norm_backward(dy, self, gamma, rstd) -> (dx, dgamma)`, dgamma in float32.
"""

from __future__ import annotations

from typing import Any

import torch
import torch_npu
from torch import Tensor

from liger_kernel._core.contract import Grads, Needs, Saved
from liger_kernel._core.shapes import as_rows
from liger_kernel.backends.npu import no_native_call
from liger_kernel.ops.rms_norm.contract import RMSNormOptions


def unserved(x: Tensor, weight: Tensor | None, *, options: RMSNormOptions) -> str | None:
    """Every casting mode is served: with one rounding, y is no worse than "llama" with its two."""
    return no_native_call(x)


def gamma_of(x: Tensor, weight: Tensor | None, offset: float) -> Tensor:
    """What multiplies the normalised row: the weight if it has the dtype of x, else exactly what it means, in fp32."""
    if weight is None:
        return torch.ones(x.shape[-1], dtype=x.dtype, device=x.device)
    if offset:
        return weight.float() + offset
    return weight if weight.dtype == x.dtype else weight.float()


def forward(
    x: Tensor, weight: Tensor | None, *, options: RMSNormOptions, needs: Needs
) -> tuple[Tensor, Saved]:
    rows = as_rows(x)
    gamma = gamma_of(x, weight, options.offset)
    y, rstd = torch_npu.npu_rms_norm(rows, gamma, epsilon=options.eps)
    return y.view(x.shape), (rows, weight, rstd)


def backward(grads: Any, saved: Any, *, options: RMSNormOptions, needs: Needs) -> Grads:
    rows, weight, rstd = saved
    return gradients(grads[0], rows, weight, rstd, options, needs)


def gradients(
    dy: Tensor,
    rows: Tensor,
    weight: Tensor | None,
    rstd: Tensor,
    options: RMSNormOptions,
    needs: Needs,
) -> Grads:
    """(dx, dw). The native function always computes both; what nobody needs is not handed out."""
    gamma = gamma_of(rows, weight, options.offset)
    dx, dgamma = torch_npu.npu_rms_norm_backward(as_rows(dy), rows, gamma, rstd)
    dw = dgamma.to(weight.dtype) if needs[1] and weight is not None else None
    return dx.view(dy.shape) if needs[0] else None, dw
