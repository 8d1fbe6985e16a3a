"""One step over rows of logits: their loss terms and, if asked, their gradient. `cross_entropy` is one step over all
rows, `fused_linear_cross_entropy` one per chunk.

A backend's `cross_entropy/<backend>.py` offers `step` and `scale_` with the signatures of this file, which serves every
device without kernels of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from liger_kernel.ops.cross_entropy.reference import FAR

Outputs = tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]
HEADROOM = 64.0  # a row of logit gradients sums to twice that: far from the largest float16, 65504


@dataclass(frozen=True)
class Options:
    """What the caller chose; `token_scaling` weighs a row by its detached probability of the label."""

    ignore_index: int = -100
    lse_square_scale: float = 0.0
    label_smoothing: float = 0.0
    reduction: str = "mean"
    softcap: float | None = None
    token_scaling: bool = False


@dataclass(frozen=True)
class Totals:
    """Sums over *all* rows, 0-d tensors on the device: nothing here waits for it. None where no formula reads it."""

    count: Tensor | None  # labels that are not ignored
    weight: Tensor | None  # class weights at those labels
    weight_all: Tensor | None  # class weights of every class

    @staticmethod
    def of(target: Tensor, weight: Tensor | None, options: Options, accuracy: bool) -> Totals:
        mean = options.reduction == "mean"
        count = (target != options.ignore_index).sum() if mean or accuracy else None
        at_labels, of_all = None, None
        if weight is not None and mean:
            used = weight.to(torch.promote_types(weight.dtype, torch.float32))
            used = used[target.clamp(0, weight.shape[0] - 1)]
            at_labels = used.masked_fill(target == options.ignore_index, 0).sum()
        if weight is not None and options.label_smoothing:
            of_all = weight.sum(dtype=torch.promote_types(weight.dtype, torch.float32))
        return Totals(count, at_labels, of_all)


@dataclass(frozen=True)
class Rows:
    """Per-row outputs; a slice of them is a view, so that every chunk writes its own part."""

    loss: Tensor  # (N,) fp32, already divided if the reduction is "mean"
    z_loss: Tensor | None  # (N,) likewise; already part of `loss`
    accuracy: Tensor | None  # (N,) fp32, 1 where the prediction is the label
    predicted: Tensor | None  # (N,) int64, -1 where the label is ignored

    @staticmethod
    def empty(target: Tensor, dtype: torch.dtype, z: bool, accuracy: bool, predicted: bool) -> Rows:
        def new(wanted: bool, dtype: torch.dtype) -> Tensor | None:
            return torch.empty(target.shape, dtype=dtype, device=target.device) if wanted else None

        loss = torch.empty(target.shape, dtype=dtype, device=target.device)
        return Rows(loss, new(z, dtype), new(accuracy, torch.float32), new(predicted, torch.int64))

    def __getitem__(self, at: slice) -> Rows:
        fields = (self.loss[at], self.z_loss, self.accuracy, self.predicted)
        return Rows(fields[0], *(None if field is None else field[at] for field in fields[1:]))

    def spread(self, at: Tensor, n_rows: int) -> Rows:
        """These rows at the indices `at` among `n_rows`; the others have an ignored label."""

        def new(field: Tensor | None, ignored: int) -> Any:
            return (
                None
                if field is None
                else field.new_full((n_rows,), ignored).index_copy_(0, at, field)
            )

        return Rows(
            new(self.loss, 0), new(self.z_loss, 0), new(self.accuracy, 0), new(self.predicted, -1)
        )

    def reduced(self, options: Options, totals: Totals) -> Outputs:
        if options.reduction == "none":
            return self.loss, self.z_loss, self.accuracy, self.predicted
        accuracy = None
        if self.accuracy is not None and totals.count is not None:
            accuracy = self.accuracy.sum() / totals.count.clamp(min=1)
        z_loss = None if self.z_loss is None else self.z_loss.sum()
        return self.loss.sum(), z_loss, accuracy, self.predicted


def step(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    totals: Totals,
    options: Options,
    out: Rows,
    grad: Tensor | None = None,
    row_scale: Tensor | None = None,
    padded: bool = False,
) -> None:
    """Write the loss terms of (N, V) logits to `out`, and the gradient of sum(loss * row_scale) to `grad`.

    `grad` may be the logits themselves. `padded`: rows start at multiples of 16 elements, and what is between them is
    free. With p the softmax, the gradient of a row's loss (formula: `reference.terms`) is
    `slope p - smooth w_v - hit [v = y]`, times 1 - tanh^2 under a soft-cap.
    """
    o, n_classes = options, logits.shape[1]
    x = logits.to(torch.promote_types(logits.dtype, torch.float32))
    ignored = target == o.ignore_index
    label = target.clamp(0, n_classes - 1)
    tanh = None
    if o.softcap is not None:
        tanh = torch.tanh(x / o.softcap)
        x = o.softcap * tanh
    lse = x.logsumexp(-1)
    shift = lse.masked_fill(lse.abs() < FAR, 0)
    if shift.device.type != "cpu" or shift.any():
        x = x - shift[:, None]
        lse = x.logsumexp(-1)
    out_of_range = (target < 0) | (target >= n_classes)  # NaN, in loss and gradient
    x_y = x.gather(1, label[:, None])[:, 0].masked_fill(out_of_range, torch.nan)
    w = None if weight is None else weight.to(x.dtype)

    hit = (
        torch.full_like(lse, 1 - o.label_smoothing)
        if w is None
        else (1 - o.label_smoothing) * w[label]
    )
    slope, loss, z = hit, hit * (lse - x_y), torch.zeros_like(lse)
    if o.lse_square_scale:
        z = o.lse_square_scale * (lse + shift).square()
    smooth = o.label_smoothing / n_classes
    if smooth:
        weight_all = n_classes if totals.weight_all is None else totals.weight_all
        loss = loss + smooth * (lse * weight_all - (x.sum(-1) if w is None else x @ w))
        slope = slope + smooth * weight_all
    factor = torch.ones_like(lse)
    z_slope = 2 * o.lse_square_scale * (lse + shift)
    if o.reduction == "mean":
        assert totals.count is not None
        factor = factor / (totals.count if totals.weight is None else totals.weight)
        z, z_slope = z / totals.count, z_slope / totals.count
    loss, slope, hit = loss * factor + z, slope * factor + z_slope, hit * factor
    if o.token_scaling:
        probability = (
            x.softmax(-1).gather(1, label[:, None])[:, 0].masked_fill(out_of_range, torch.nan)
        )
        loss, z, slope, hit = (t * probability for t in (loss, z, slope, hit))
        factor = factor * probability

    out.loss.copy_(loss.masked_fill(ignored, 0))
    if out.z_loss is not None:
        out.z_loss.copy_(z.masked_fill(ignored, 0))
    if out.accuracy is not None or out.predicted is not None:
        best = x.argmax(-1).masked_fill(ignored, -1)
        for field, value in ((out.accuracy, (best == target) & ~ignored), (out.predicted, best)):
            if field is not None:
                field.copy_(value)
    if grad is None:
        return
    g = x.softmax(-1).mul_(slope.masked_fill(out_of_range, torch.nan)[:, None])
    if smooth:
        g -= (smooth * factor)[:, None] * (1 if w is None else w)
    g.scatter_(1, label[:, None], g.gather(1, label[:, None]) - hit[:, None])
    if tanh is not None:
        g *= 1 - tanh.square()
    if row_scale is not None:
        g *= row_scale.to(g.dtype)[:, None]
    grad.copy_(g.masked_fill_(ignored[:, None], 0))


def gradient_unit(
    dtype: torch.dtype, options: Options, totals: Totals, device: torch.device
) -> Tensor | None:
    """By what logit gradients are multiplied while `dtype` holds them; None for 1.

    Divided by the number of tokens, the gradients of unlikely classes fall below what float16 can hold, and a gradient
    scaler comes too late for them: it multiplies the loss that these gradients are already made of.
    """
    if dtype != torch.float16:
        return None
    divisor = None
    if options.reduction == "mean":
        divisor = totals.count if totals.weight is None else totals.weight
    if divisor is None:
        return torch.full((), HEADROOM, device=device)
    tokens = divisor.to(torch.float32)
    tokens = tokens.masked_fill(tokens <= 0, 1)
    return HEADROOM * tokens.log2().ceil().exp2()  # a power of 2: taking it back rounds nothing


def scale_(buffers: Sequence[Tensor | None], factor: Tensor) -> None:
    """Multiply up to three contiguous buffers by a 0-d tensor, in place."""
    for buffer in buffers:
        if buffer is not None:
            buffer.mul_(factor)
