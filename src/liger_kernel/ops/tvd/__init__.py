"""Total variation distance between two given distributions over classes."""

from __future__ import annotations

from torch import Tensor

from liger_kernel._core.lazy import compat_names
from liger_kernel.backends.dispatch import Dispatch
from liger_kernel.ops import OPS
from liger_kernel.ops.divergences import Divergence, divergence, on_shards_of_rows
from liger_kernel.ops.tvd import reference
from liger_kernel.ops.tvd.contract import TVDOptions


class _TVD(Divergence):
    pass


_dispatch = Dispatch("tvd", _TVD, reference.tvd, shards=on_shards_of_rows)


def tvd(
    p: Tensor,
    q: Tensor,
    shift_labels: Tensor | None = None,
    reduction: str = "batchmean",
    ignore_index: int = -100,
) -> Tensor:
    """Total variation distance, the sum of `|p - q| / 2`.

    Args:
        p: (N, V) probabilities of the student, any floating dtype, any strides. DTensors are computed by shards of
            rows.
        q: (N, V), the teacher's. A constant: it gets no gradient.
        shift_labels: (N,) integers; a row whose label is `ignore_index` is not read and counts for nothing.
        reduction: "sum"; "batchmean", divided by the number of rows that count; "mean", by that of their terms; "none".

    Returns: fp32 (float64 for float64), 0-d, or (N, V) with "none"; 0 where no row counts. The derivative is 0 where
        p = q.
    Raises: ValueError for shapes or a reduction that do not fit, TypeError for a dtype that does not.
    """
    options = TVDOptions(reduction, ignore_index)
    return divergence(_dispatch, options, shift_labels, p=p, q=q)


__getattr__ = compat_names(__name__, OPS["tvd"])
