"""RMSNorm by the kernels of `norms`: forward moves 2 n elements, backward 3 n."""

from __future__ import annotations

from torch import Tensor

from liger_kernel._core.contract import Grads, Needs, Saved
from liger_kernel.ops.norms.kernels import norm_backward, norm_forward
from liger_kernel.ops.rms_norm.contract import RMSNormOptions


def forward(
    x: Tensor, weight: Tensor | None, *, options: RMSNormOptions, needs: Needs
) -> tuple[Tensor, Saved]:
    y, _, rows, _, rstd = norm_forward(x, options, weight)
    return y, (rows, weight, rstd)


def backward(grads: Grads, saved: Saved, *, options: RMSNormOptions, needs: Needs) -> Grads:
    rows, weight, rstd = saved
    dx, dw, _ = norm_backward(grads[0], rows, options, needs, weight, rstd)
    return dx, dw


def factors(saved: Saved, options: RMSNormOptions) -> tuple[Tensor, Tensor, Tensor | None]:
    """Of what `forward` saved: rows (R, N), rstd (R,) and weight (N,), whose product is y but for its rounding."""
    rows, weight, rstd = saved
    assert rows is not None
    assert rstd is not None
    return rows, rstd, weight if weight is None or not options.offset else weight + options.offset
