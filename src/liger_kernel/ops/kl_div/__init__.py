"""KL divergence between two given distributions over classes."""

from __future__ import annotations

from torch import Tensor

from liger_kernel._core.lazy import compat_names
from liger_kernel.backends.dispatch import Dispatch
from liger_kernel.ops import OPS
from liger_kernel.ops.divergences import Divergence, divergence, on_shards_of_rows
from liger_kernel.ops.kl_div import reference
from liger_kernel.ops.kl_div.contract import KLDivOptions


class _KLDiv(Divergence):
    pass


_dispatch = Dispatch("kl_div", _KLDiv, reference.kl_div, shards=on_shards_of_rows)


def kl_div(
    y_pred: Tensor,
    y_true: Tensor,
    reduction: str = "batchmean",
    log_target: bool = False,
    eps: float = 1e-10,
) -> Tensor:
    """KL(y_true || y_pred), term by term as in `torch.nn.functional.kl_div`.

    Args:
        y_pred: (N, V) log-probabilities, any floating dtype, any strides. DTensors are computed by shards of rows.
        y_true: (N, V) probabilities, or with `log_target` log-probabilities. A constant: it gets no gradient.
        reduction: "sum"; "batchmean", divided by N; "mean", divided by N V; "none".
        eps: a target probability below it has the logarithm of `eps`.

    Returns: fp32 (float64 for float64), 0-d, or (N, V) with "none".
    Differs from torch: a class of probability 0 adds 0 even where y_pred is -inf, and the mean over no rows is 0.
    Raises: ValueError for shapes or a reduction that do not fit, TypeError for integers.
    """
    options = KLDivOptions(reduction, log_target, eps)
    return divergence(_dispatch, options, None, y_pred=y_pred, y_true=y_true)


__getattr__ = compat_names(__name__, OPS["kl_div"])
