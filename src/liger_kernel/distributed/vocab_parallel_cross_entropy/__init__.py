"""Cross entropy over classes that are spread over ranks: no rank ever sees the logits of another one.

Each rank reads its logits once, and says five numbers of each row (`ops.cross_entropy.contract.Kernels.statistics`).
These of all ranks make the loss, on every rank the same, and the factors of the gradient of its own logits.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from liger_kernel._core.autograd import is_transformed, refuse_double_backward
from liger_kernel._core.checks import check_choice, check_floating, check_same_device
from liger_kernel._core.rows import RowOutputs
from liger_kernel._core.shapes import as_rows, cdiv
from liger_kernel.backends import kernels_of
from liger_kernel.distributed.shards import (
    VocabShard,
    statistics_of_all,
    sum_of_gradients,
)
from liger_kernel.loss_head.losses.cross_entropy import CrossEntropyLoss, Prepared
from liger_kernel.loss_head.node import linear_loss
from liger_kernel.loss_head.plan import ChunkOptions
from liger_kernel.loss_head.row_loss import RowLoss
from liger_kernel.ops.cross_entropy import (
    check_class_indices,
    check_labels,
    check_loss_options,
    only_loss_has_gradient,
    portable,
)
from liger_kernel.ops.cross_entropy.contract import CrossEntropyRows, Outputs, Totals

FORMULAS, MODES = ("pytorch", "megatron"), ("global", "partition")


@dataclass(frozen=True)
class ShardedCrossEntropyLoss(CrossEntropyLoss):
    """Options: those of cross entropy, `VocabShard`, and whether labels are smoothed over the classes of a rank."""

    name: ClassVar[str] = "vocab_parallel_cross_entropy"

    first: int = 0
    n_classes: int | None = None  # None: those of the logits
    group: str = ""
    ranks: int = 1
    smooths_here: bool = False

    def whole_vocabulary(self, n_here: int) -> int:
        return n_here if self.n_classes is None else self.n_classes

    def agreed(self, weight: Tensor) -> Tensor:
        largest = cdiv(self.whole_vocabulary(weight.shape[0]), self.ranks)
        return weight.new_empty(1, 1).expand(largest, weight.shape[1])

    def prepare(self, target: Tensor, class_weight: Tensor | None) -> Prepared:
        if class_weight is not None:
            raise ValueError(f"{type(self).__name__} has no class weights; pass class_weight=None.")
        return super().prepare(target, None)

    def step(
        self,
        logits: Tensor,
        teacher: Tensor | None,
        target: Tensor,
        prepared: Prepared,
        *,
        out: RowOutputs,
        grad: Tensor | None = None,
        row_scale: Tensor | None = None,
        padded: bool = False,
    ) -> None:
        assert isinstance(out, CrossEntropyRows)
        factors = self.factors(logits, target, prepared[0], out, padded)
        if grad is not None:
            if row_scale is not None:
                factors[1:] *= row_scale
            self.gradient(logits, target, factors, grad, padded)

    of_logits = RowLoss.of_logits

    def factors(
        self, logits: Tensor, target: Tensor, totals: Totals, out: CrossEntropyRows, padded: bool
    ) -> Tensor:
        """What the gradient of the logits is made with, (4, N), as `Kernels.gradient` reads it; `out` is filled."""
        n_here = logits.shape[1]
        shard = VocabShard(self.first, self.whole_vocabulary(n_here), self.group, self.ranks)
        wide = torch.promote_types(logits.dtype, torch.float32)
        here = torch.empty((5, logits.shape[0]), dtype=wide, device=logits.device)
        if n_here:
            how = {"first": self.first, "options": self, "out": here, "padded": padded}
            _kernels(logits).statistics(logits, target, **how)
        else:
            here.zero_()[0] = -torch.inf
        found = statistics_of_all(here, n_here, shard, self.smooths_here)
        n_smoothed = n_here if self.smooths_here else shard.n_classes
        return self._terms(found, target, totals, out, n_smoothed, shard.n_classes)

    def _terms(
        self,
        found: Tensor,
        target: Tensor,
        totals: Totals,
        out: CrossEntropyRows,
        n_smoothed: int,
        n_classes: int,
    ) -> Tensor:
        top, total, x_y, smooth, best = found
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
            assert totals.count is not None
            loss, slope, z, z_slope = (t / totals.count for t in (loss, slope, z, z_slope))
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
        self, logits: Tensor, target: Tensor, factors: Tensor, grad: Tensor, padded: bool
    ) -> None:
        if logits.shape[1]:
            how = {"first": self.first, "options": self, "grad": grad, "padded": padded}
            _kernels(logits).gradient(logits, target, factors, **how)


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
        n_classes: V; see `VocabShard.of`.
        smooths_here: labels are smoothed over the classes of each rank alone, so that the losses of ranks differ.
        options: of `cross_entropy`, but for `in_place` and `weight`.

    Returns: as `cross_entropy`, but loss and z-loss in at least fp32; the same on every rank.
    Raises: as `cross_entropy`. ValueError where the ranks do not hold the classes that each supposes, on the CPU;
        elsewhere the loss is NaN then.
    """
    loss = _loss(logits.shape[-1], group, n_classes, smooths_here, options)
    check_floating(logits=logits)
    if logits.ndim != 2 or target.shape != logits.shape[:1]:
        raise ValueError(
            f"logits have shape {tuple(logits.shape)} and target {tuple(target.shape)}, not (N, V) and (N,); "
            f"flatten them with .view(-1, logits.shape[-1]) and .view(-1)."
        )
    check_class_indices(target)
    check_same_device(logits=logits, target=target)
    target = target.to(torch.int64).contiguous()
    if not is_transformed():
        check_labels(target, loss.whole_vocabulary(logits.shape[1]), loss.ignore_index)
    if not torch.is_grad_enabled():
        logits = logits.detach()
    found: Outputs = _VocabParallelCrossEntropy.apply(logits, target, loss)
    return found


class _VocabParallelCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, target: Tensor, loss: Any) -> Outputs:
        rows, totals = as_rows(logits), loss.prepare(target, None)[0]
        out = loss.outputs(target, torch.promote_types(rows.dtype, torch.float32))
        factors = loss.factors(rows, target, totals, out, False)
        outputs: Outputs = out.reduced(loss, totals)
        only_loss_has_gradient(ctx, outputs)
        ctx.save_for_backward(rows, target, factors)
        ctx.loss = loss
        return outputs

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, None, None]:
        if not torch.compiler.is_compiling():  # which traces this
            refuse_double_backward()
        if grads[0] is None:
            return None, None, None
        rows, target, factors = ctx.saved_tensors
        grad = torch.empty(rows.shape, dtype=rows.dtype, device=rows.device)
        factors = torch.cat((factors[:1], factors[1:] * grads[0]))
        ctx.loss.gradient(rows, target, factors, grad, False)
        return grad, None, None


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
    loss = _loss(weight.shape[0], group, n_classes, False, options)
    hidden = sum_of_gradients(hidden, loss.group)
    found: Any = linear_loss(loss, hidden, weight, target, bias, chunks=chunks)
    outputs: Outputs = found
    return outputs


def _loss(
    n_here: int, group: Any, n_classes: int | None, smooths_here: bool, options: dict[str, Any]
) -> ShardedCrossEntropyLoss:
    shard = VocabShard.of(n_here, group, n_classes)
    loss = ShardedCrossEntropyLoss(
        **options,
        **vars(shard),
        smooths_here=smooths_here,
    )
    check_loss_options(min(1.0, loss.label_smoothing), loss.reduction, loss.softcap)
    return loss


def validate_formula_and_mode(label_smoothing_formula: str, label_smoothing_mode: str) -> None:
    """ValueError for another formula than "pytorch" and "megatron", or another mode than "global" and "partition"."""
    check_choice("label_smoothing_formula", label_smoothing_formula, FORMULAS)
    check_choice("label_smoothing_mode", label_smoothing_mode, MODES)
