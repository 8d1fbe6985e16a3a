"""RMSNorm and modulation in plain PyTorch: the specification."""

import torch
from torch import Tensor

from liger_kernel.ops.rms_norm.reference import rms_norm


def modulated_rms_norm(
    x: Tensor,
    weight: Tensor | None,
    scale: Tensor,
    shift: Tensor | None,
    eps: float,
    offset: float,
    casting_mode: str,
) -> Tensor:
    """y = rms_norm(x) (1 + scale) + shift; of the rows of x, as many neighbours share a row of scale as there are more.

    The norm is rounded to the dtype of x, and the result once more; between, all is fp32 (float64 for float64 input).
    """
    compute = torch.promote_types(x.dtype, torch.float32)
    normed = rms_norm(x, weight, eps, offset, casting_mode).to(compute)
    one, n_cols = scale.to(compute).reshape(-1, 1, x.shape[-1]) + 1, x.shape[-1]
    y = normed.reshape(one.shape[0], -1, n_cols) if x.numel() else normed.reshape(0, 1, n_cols)
    y = y * one
    if shift is not None:
        y = y + shift.to(compute).reshape(-1, 1, n_cols)
    return y.to(x.dtype).reshape(x.shape)
