"""The projection from which hyper-connections (mHC, Xie et al. 2025, https://arxiv.org/abs/2512.24880) take their
coefficients: RMSNorm without a weight, and a product with a matrix of a few columns, in one pass over the streams."""

from __future__ import annotations

from torch import Tensor

from liger_kernel._core.autograd import Op
from liger_kernel._core.checks import check_floating, check_same_device
from liger_kernel._core.lazy import compat_names
from liger_kernel.backends.dispatch import Dispatch, no_shards
from liger_kernel.ops import OPS
from liger_kernel.ops.mhc_project import reference
from liger_kernel.ops.mhc_project.contract import MHCProjectOptions


class _MHCProject(Op):
    pass


_dispatch = Dispatch(
    "mhc_project",
    _MHCProject,
    reference.mhc_project,
    shards=no_shards("mhc_project", "call it on the local shards, .to_local()"),
)


def mhc_project(x: Tensor, weight: Tensor, eps: float = 1e-6) -> Tensor:
    """`(x @ weight) / sqrt(mean(x^2) + eps)`, for a weight of few columns.

    Args:
        x: (..., K), all streams of a token side by side, any floating dtype.
        weight: (K, M), any floating dtype, any strides.

    Returns: (..., M) in fp32, computed in fp32 whatever autocast says.
    Raises: ValueError for shapes that do not fit; TypeError for integers and DTensors.
    """
    check_floating(x=x, weight=weight)
    check_same_device(x=x, weight=weight)
    if x.ndim == 0 or weight.ndim != 2 or weight.shape[0] != x.shape[-1]:
        raise ValueError(
            f"x {tuple(x.shape)} and weight {tuple(weight.shape)} do not fit each other; pass (..., K) and (K, M)."
        )
    return _dispatch(MHCProjectOptions(float(eps)), x, weight)


__getattr__ = compat_names(__name__, OPS["mhc_project"])
