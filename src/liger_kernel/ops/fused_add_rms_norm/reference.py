"""Residual addition followed by RMSNorm in plain PyTorch: the specification."""

from torch import Tensor

from liger_kernel.ops.rms_norm.reference import rms_norm


def fused_add_rms_norm(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    eps: float,
    offset: float,
    casting_mode: str,
) -> tuple[Tensor, Tensor]:
    """(y, s): s = x + residual in the dtype of x, or x, and y = `rms_norm` of s."""
    s = x if residual is None else x + residual
    return rms_norm(s, weight, eps, offset, casting_mode), s
