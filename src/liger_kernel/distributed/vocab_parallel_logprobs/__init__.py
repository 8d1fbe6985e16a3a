"""Log-probabilities, entropy and the like over classes that are spread over ranks, of logits or of hidden states."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from liger_kernel._core.autograd import is_transformed
from liger_kernel._core.checks import check_floating
from liger_kernel._core.rows import RowOutputs
from liger_kernel.backends import kernels_of
from liger_kernel.distributed.shards import ShardedLoss, on_logits, shard_of, sum_of_gradients
from liger_kernel.loss_head.losses.logprobs import LogProbsLoss
from liger_kernel.loss_head.node import linear_loss
from liger_kernel.loss_head.plan import ChunkOptions
from liger_kernel.loss_head.row_loss import RowLoss
from liger_kernel.ops.logprobs import checked, named, portable, split_temperature
from liger_kernel.ops.logprobs.contract import LogProbRows, LogProbs


@dataclass(frozen=True)
class ShardedLogProbsLoss(ShardedLoss, LogProbsLoss):
    """Options: those of `LogProbsLoss`, but for `top_k`, and of the shard."""

    name: ClassVar[str] = "vocab_parallel_logprobs"
    whole: ClassVar[type[RowLoss]] = LogProbsLoss

    def said(
        self,
        logits: Tensor,
        target: Tensor,
        prepared: Tensor | None,
        out: RowOutputs,
        padded: bool,
    ) -> Tensor:
        """The statistics of all classes."""
        assert isinstance(out, LogProbRows)
        kernels = _kernels(logits)
        found = self.of_all(kernels, logits, target, prepared, rows=7, padded=padded)
        n_classes = self.whole_vocabulary(logits.shape[1])
        portable.write_numbers(found, target, n_classes, options=self, out=out)
        return found

    def gradient(
        self,
        logits: Tensor,
        target: Tensor,
        prepared: Tensor | None,
        said: Tensor,
        *,
        grad: Tensor,
        row_scale: Tensor | None,
        padded: bool,
    ) -> None:
        if not logits.shape[1]:
            return
        n_classes = self.whole_vocabulary(logits.shape[1])
        factors = portable.factors_of(said, target, n_classes, row_scale, options=self)
        how = {"first": self.first, "options": self, "grad": grad, "padded": padded}
        _kernels(logits).gradient(logits, target, prepared, factors, **how)


def _kernels(logits: Tensor) -> Any:
    return portable if is_transformed() else kernels_of("logprobs", logits)


def vocab_parallel_logprobs(
    logits: Tensor,
    ids: Tensor,
    group: Any = None,
    *,
    n_classes: int | None = None,
    temperature: float | Tensor = 1.0,
    **options: Any,
) -> LogProbs:
    """`ops.logprobs.logprobs` of logits (..., V) whose classes are spread over the ranks of `group`.

    Args:
        logits: (..., classes of this rank). They are kept for backward, and not changed.
        ids: (...) integers, the same on every rank: in [0, V), or `ignore_index`.
        group, n_classes: as in `vocab_parallel_cross_entropy`.
        temperature, options: of `logprobs`, but for `top_k`.

    Returns: as `logprobs`, the same on every rank.
    Raises: as `logprobs`, and as `vocab_parallel_cross_entropy` where the ranks disagree.
    """
    check_floating(logits=logits)
    if logits.ndim == 0 or ids.shape != logits.shape[:-1]:
        raise ValueError(
            f"logits have shape {tuple(logits.shape)} and ids {tuple(ids.shape)}, not (..., V) and (...)."
        )
    loss, of_rows = _loss(logits.shape[-1], group, n_classes, temperature, ids, options)
    found = on_logits(loss, logits.flatten(0, -2), ids.reshape(-1), of_rows)
    return named(found, loss, ids.shape)


def vocab_parallel_linear_logprobs(
    hidden: Tensor,
    weight: Tensor,
    ids: Tensor,
    group: Any = None,
    *,
    bias: Tensor | None = None,
    n_classes: int | None = None,
    temperature: float | Tensor = 1.0,
    chunks: ChunkOptions = ChunkOptions(),  # noqa: B008 - frozen
    **options: Any,
) -> LogProbs:
    """`linear_logprobs` of a head whose classes are spread over the ranks of `group`; no rank has logits.

    Args:
        hidden: (..., H) and ids: (...), the same on every rank. weight: (classes of this rank, H); bias likewise.
        group, n_classes, temperature, options: as in `vocab_parallel_logprobs`.

    The gradient of `hidden` is summed over the ranks in backward, in its dtype; that of the weight stays here. A chunk
    of rows takes one collective of eight numbers a row.
    """
    if hidden.ndim == 0 or ids.shape != hidden.shape[:-1]:
        raise ValueError(
            f"hidden has shape {tuple(hidden.shape)} and ids {tuple(ids.shape)}, not (..., H) and (...)."
        )
    loss, of_rows = _loss(weight.shape[0], group, n_classes, temperature, ids, options)
    rows = sum_of_gradients(hidden.reshape(-1, hidden.shape[-1]), loss.group)
    found: Any = linear_loss(
        loss, rows, weight, ids.reshape(-1), bias, class_weight=of_rows, chunks=chunks
    )
    return named(found, loss, ids.shape)


def _loss(
    n_here: int,
    group: Any,
    n_classes: int | None,
    temperature: float | Tensor,
    ids: Tensor,
    options: dict[str, Any],
) -> tuple[ShardedLogProbsLoss, Tensor | None]:
    if options.get("top_k"):
        raise ValueError(
            f"top_k={options['top_k']} over classes of several ranks is not computed; pass 0."
        )
    number, of_rows = split_temperature(temperature, ids, options.get("ignore_index", -100))
    shard = shard_of(n_here, group, n_classes)
    loss = ShardedLogProbsLoss(temperature=number, **options, **shard)
    checked(loss, loss.whole_vocabulary(n_here))
    return loss, of_rows
