"""Generalised Jensen-Shannon divergence between two given distributions over classes (GKD, arXiv:2306.13649)."""

from __future__ import annotations

from torch import Tensor

from liger_kernel._core.lazy import compat_names
from liger_kernel.backends.dispatch import Dispatch
from liger_kernel.ops import OPS
from liger_kernel.ops.divergences import Divergence, divergence, on_shards_of_rows
from liger_kernel.ops.jsd import reference
from liger_kernel.ops.jsd.contract import JSDOptions


class _JSD(Divergence):
    pass


_dispatch = Dispatch("jsd", _JSD, reference.jsd, shards=on_shards_of_rows)


def jsd(
    log_q: Tensor,
    log_p: Tensor,
    shift_labels: Tensor | None = None,
    beta: float = 0.5,
    ignore_index: int = -100,
) -> Tensor:
    """beta KL(p || m) + (1 - beta) KL(q || m), m = beta p + (1 - beta) q: the mean over the rows.

    Args:
        log_q: (N, V) log-probabilities of the student, any floating dtype, any strides. DTensors are computed by shards
            of rows.
        log_p: (N, V), the teacher's. A constant: it gets no gradient.
        shift_labels: (N,) integers; a row whose label is `ignore_index` is not read and counts for nothing.
        beta: 0 is KL(p || q), the forward KL divergence, and 1 the reverse, KL(q || p).

    Returns: 0-d, in the dtype of log_q; 0 where no row counts.
    Raises: ValueError for shapes that do not fit or a beta outside of [0, 1], TypeError for a dtype that does not.
    """
    options = JSDOptions(beta, ignore_index)
    found = divergence(_dispatch, options, shift_labels, log_q=log_q, log_p=log_p)
    return found.to(log_q.dtype)


__getattr__ = compat_names(__name__, OPS["jsd"])
