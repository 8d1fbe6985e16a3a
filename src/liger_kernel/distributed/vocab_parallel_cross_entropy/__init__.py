"""Cross entropy over classes that are spread over ranks: no rank ever sees the logits of another one.

Each rank reads its logits once, and says five numbers of each row (`ops.cross_entropy.contract.Kernels.statistics`).
These of all ranks make the loss, on every rank the same, and the factors of the gradient of its own logits.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from liger_kernel._core.autograd import is_transformed
from liger_kernel._core.checks import check_choice, check_floating
from liger_kernel._core.rows import RowOutputs
from liger_kernel.backends import kernels_of
from liger_kernel.distributed.shards import ShardedLoss, on_logits, shard_of, sum_of_gradients
from liger_kernel.loss_head.losses.cross_entropy import CrossEntropyLoss, Prepared
from liger_kernel.loss_head.node import linear_loss
from liger_kernel.loss_head.plan import ChunkOptions
from liger_kernel.loss_head.row_loss import RowLoss
from liger_kernel.ops.cross_entropy import check_loss_options, portable
from liger_kernel.ops.cross_entropy.contract import Outputs

FORMULAS, MODES = ("pytorch", "megatron"), ("global", "partition")


@dataclass(frozen=True)
class ShardedCrossEntropyLoss(ShardedLoss, CrossEntropyLoss):
    """Options: those of cross entropy, of the shard, and whether labels are smoothed over the classes of a rank."""

    name: ClassVar[str] = "vocab_parallel_cross_entropy"
    whole: ClassVar[type[RowLoss]] = CrossEntropyLoss

    smooths_here: bool = False

    def prepare(self, target: Tensor, class_weight: Tensor | None) -> Prepared:
        if class_weight is not None:
            raise ValueError(f"{type(self).__name__} has no class weights; pass class_weight=None.")
        return super().prepare(target, None)

    def said(
        self, logits: Tensor, target: Tensor, prepared: Prepared, out: RowOutputs, padded: bool
    ) -> Tensor:
        """The factors of `Kernels.gradient`."""
        n_classes = self.whole_vocabulary(logits.shape[1])
        n_smoothed = logits.shape[1] if self.smooths_here else n_classes
        top, total, x_y, smooth, best = self.of_all(
            _kernels(logits), logits, target, rows=5, padded=padded, sums_here=self.smooths_here
        )
        ignored = target == self.ignore_index
        wrong = (target < 0) | (target >= n_classes)
        log_total = total.log()
        lse = top + log_total
        nll = (log_total - (x_y - top)).masked_fill(wrong, torch.nan)
        a = self.label_smoothing
        loss, slope = nll, torch.ones_like(nll)
        if a:
            loss = (1 - a) * nll + a * (lse - smooth / n_smoothed)
        z, z_slope = self.lse_square_scale * lse.square(), 2 * self.lse_square_scale * lse
        if self.reduction == "mean":
            count = prepared[0].count
            assert count is not None
            loss, slope, z, z_slope = (t / count for t in (loss, slope, z, z_slope))
        hit, share = (1 - a) * slope, a / max(1, n_smoothed) * slope
        loss, slope = loss + z, (slope + z_slope) / total
        if self.token_scaling:
            probability = nll.neg().exp()
            loss, z, slope, hit, share = (t * probability for t in (loss, z, slope, hit, share))
        predicted = best.to(torch.int64)
        columns = (loss, z, predicted == target, predicted)
        for column, values, of_ignored in zip(out.columns, columns, out.ignored, strict=True):
            if column is not None:
                column.copy_(values.masked_fill(ignored, of_ignored))
        return torch.stack((top, slope.masked_fill(wrong, torch.nan), hit, share))

    def gradient(
        self,
        logits: Tensor,
        target: Tensor,
        prepared: Any,
        said: Tensor,
        *,
        grad: Tensor,
        row_scale: Tensor | None,
        padded: bool,
    ) -> None:
        if row_scale is not None:
            said = torch.cat((said[:1], said[1:] * row_scale))
        if logits.shape[1]:
            how = {"first": self.first, "options": self, "grad": grad, "padded": padded}
            _kernels(logits).gradient(logits, target, said, **how)


def _kernels(logits: Tensor) -> Any:
    return portable if is_transformed() else kernels_of("cross_entropy", logits)


def vocab_parallel_cross_entropy(
    logits: Tensor,
    target: Tensor,
    group: Any = None,
    *,
    n_classes: int | None = None,
    smooths_here: bool = False,
    **options: Any,
) -> Outputs:
    """`cross_entropy` of logits (N, V) whose classes are spread over the ranks of `group`.

    Args:
        logits: (N, classes of this rank), any floating dtype, any strides. They are kept for backward, and unchanged.
        target: (N,) integer labels, the same on every rank: in [0, V), or `ignore_index`.
        group: a process group, whose rank r has the r-th part of the classes; None for one rank.
        n_classes: V; see `shard_of`.
        smooths_here: labels are smoothed over the classes of each rank alone, so that the losses of ranks differ.
        options: of `cross_entropy`, but for `in_place` and `weight`.

    Returns: as `cross_entropy`, but loss and z-loss in at least fp32; the same on every rank.
    Raises: as `cross_entropy`. ValueError where the ranks do not hold the classes that each supposes, on the CPU;
        elsewhere the loss is NaN then.
    """
    loss = _loss(logits.shape[-1], group, n_classes, options, smooths_here)
    check_floating(logits=logits)
    found: Outputs = on_logits(loss, logits, target)
    return found


def vocab_parallel_linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    group: Any = None,
    bias: Tensor | None = None,
    *,
    n_classes: int | None = None,
    chunks: ChunkOptions = ChunkOptions(),  # noqa: B008 - frozen
    **options: Any,
) -> Outputs:
    """`fused_linear_cross_entropy` of a head whose classes are spread over the ranks of `group`; no rank has logits.

    Args:
        hidden: (N, H) and target: (N,), the same on every rank. weight: (classes of this rank, H); bias likewise.
        group, n_classes: as in `vocab_parallel_cross_entropy`.
        options: of `fused_linear_cross_entropy`, but for `class_weight` and those of `ChunkOptions`.

    The gradient of `hidden` is summed over the ranks in backward, in its dtype; that of the weight stays here. A chunk
    of rows takes one collective of six numbers a row.
    """
    options["token_scaling"] = options.pop("use_token_scaling", False)
    loss = _loss(weight.shape[0], group, n_classes, options)
    hidden = sum_of_gradients(hidden, loss.group)
    found: Any = linear_loss(loss, hidden, weight, target, bias, chunks=chunks)
    outputs: Outputs = found
    return outputs


def _loss(
    n_here: int,
    group: Any,
    n_classes: int | None,
    options: dict[str, Any],
    smooths_here: bool = False,
) -> ShardedCrossEntropyLoss:
    shard = shard_of(n_here, group, n_classes)
    loss = ShardedCrossEntropyLoss(**options, **shard, smooths_here=smooths_here)
    check_loss_options(min(1.0, loss.label_smoothing), loss.reduction, loss.softcap)
    return loss


def validate_formula_and_mode(label_smoothing_formula: str, label_smoothing_mode: str) -> None:
    """ValueError for another formula than "pytorch" and "megatron", or another mode than "global" and "partition"."""
    check_choice("label_smoothing_formula", label_smoothing_formula, FORMULAS)
    check_choice("label_smoothing_mode", label_smoothing_mode, MODES)
