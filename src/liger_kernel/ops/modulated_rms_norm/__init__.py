"""RMSNorm whose output is scaled and shifted by a condition: the adaptive norm of diffusion transformers (Peebles & Xie
2022, https://arxiv.org/abs/2212.09748) around RMSNorm (Zhang & Sennrich 2019, https://arxiv.org/abs/1910.07467)."""

from __future__ import annotations

from torch import Tensor

from liger_kernel._core.autograd import Op
from liger_kernel._core.checks import check_choice, check_parameters, check_same_device
from liger_kernel._core.lazy import compat_names
from liger_kernel.backends.dispatch import Dispatch, no_shards
from liger_kernel.ops import OPS
from liger_kernel.ops.modulated_rms_norm import reference
from liger_kernel.ops.modulated_rms_norm.contract import ModulatedRMSNormOptions
from liger_kernel.ops.norms import CASTING_MODES


class _ModulatedRMSNorm(Op):
    pass


_dispatch = Dispatch(
    "modulated_rms_norm",
    _ModulatedRMSNorm,
    reference.modulated_rms_norm,
    shards=no_shards("modulated_rms_norm", "call it on the local shards, .to_local()"),
)


def modulated_rms_norm(
    x: Tensor,
    weight: Tensor | None,
    scale: Tensor,
    shift: Tensor | None = None,
    eps: float = 1e-6,
    offset: float = 0.0,
    casting_mode: str = "llama",
) -> Tensor:
    """`rms_norm(x, weight) * (1 + scale) + shift`.

    Args:
        x: (..., N), any floating dtype, any strides.
        weight, eps, offset, casting_mode: as in `rms_norm`.
        scale: (N,), (B, N) for x (B, T, N), or the shape of x: a number of rows that divides that of x; equally many
            neighbouring rows of x share each.
        shift: as many rows, or None.

    Returns: (..., N) in the dtype of x. The norm is rounded to it, and the result once more; between, all is fp32.
    Raises: ValueError for an unknown mode or what does not fit; TypeError for integer tensors and for DTensors.
    """
    check_choice("casting_mode", casting_mode, CASTING_MODES)
    check_modulation(x, weight, scale, shift)
    return _dispatch(ModulatedRMSNormOptions(eps, offset, casting_mode), x, weight, scale, shift)


def check_modulation(x: Tensor, weight: Tensor | None, scale: Tensor, shift: Tensor | None) -> int:
    """How many rows of x share one of scale."""
    check_parameters(x, weight=weight)
    size, rows = x.shape[-1], x.shape[:-1].numel()
    for name, t in (("scale", scale), ("shift", shift)):
        if t is None:
            continue
        check_same_device(x=x, **{name: t})
        if not t.is_floating_point():
            raise TypeError(
                f"{name} must have a floating dtype, got {t.dtype}; convert it with .to()."
            )
        of = t.shape[:-1].numel()
        if t.ndim == 0 or t.shape[-1] != size or (rows and (of == 0 or rows % of)):
            raise ValueError(
                f"{name} has shape {tuple(t.shape)}, which does not part the rows of x {tuple(x.shape)} evenly; "
                f"pass one of shape ({size},), or one row for equally many rows of x each."
            )
    if shift is not None and shift.numel() != scale.numel():
        raise ValueError(
            f"scale has shape {tuple(scale.shape)}, but shift {tuple(shift.shape)}; pass as many rows of both."
        )
    return rows // max(1, scale.shape[:-1].numel())


__getattr__ = compat_names(__name__, OPS["modulated_rms_norm"])
