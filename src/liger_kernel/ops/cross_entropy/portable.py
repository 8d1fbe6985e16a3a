"""The step of cross entropy in plain PyTorch, for every device without kernels of its own. See `contract.Kernels`."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from liger_kernel.backends import can_look
from liger_kernel.ops.cross_entropy.contract import CrossEntropyOptions, CrossEntropyRows, Totals

#: of the logits in fp32 that one thread goes through at a time, all passes over them: about what its cache holds
BLOCK_BYTES = 2**21


def step(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    *,
    totals: Totals,
    options: CrossEntropyOptions,
    out: CrossEntropyRows,
    grad: Tensor | None,
    row_scale: Tensor | None,
    padded: bool,
) -> None:
    for at in row_blocks(logits):
        of_rows = (None if t is None else t[at] for t in (grad, row_scale))
        _step(logits[at], target[at], weight, totals, options, out[at], *of_rows)


def row_blocks(logits: Tensor) -> Iterator[slice]:
    """The rows of (N, V) logits, as many at a time as a step should go through."""
    n_rows, block = logits.shape[0], logits.shape[0]
    if can_look(
        logits
    ):  # no queue hides what a call costs, but several passes over rows in the cache are cheap
        size = torch.promote_types(logits.dtype, torch.float32).itemsize * logits.shape[1]
        block = max(1, BLOCK_BYTES * torch.get_num_threads() // max(1, size))
    return (slice(at, at + block) for at in range(0, n_rows, max(1, block)))


def _step(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    totals: Totals,
    options: CrossEntropyOptions,
    out: CrossEntropyRows,
    grad: Tensor | None,
    row_scale: Tensor | None,
) -> None:
    o, n_classes = options, logits.shape[1]
    x, tanh = _capped(logits, o.softcap)
    ignored = target == o.ignore_index
    label = target.clamp(0, n_classes - 1)
    log_p = x.log_softmax(-1)
    out_of_range = (target < 0) | (target >= n_classes)  # NaN, in loss and gradient
    log_p_y = log_p.gather(1, label[:, None])[:, 0].masked_fill(out_of_range, torch.nan)
    w = None if weight is None else weight.to(x.dtype)
    smooth = o.label_smoothing / n_classes
    log_p_all = log_p_y if not smooth else log_p.sum(-1) if w is None else log_p @ w
    lse = torch.zeros_like(log_p_y)
    if o.lse_square_scale:
        top, at = x.max(-1, keepdim=True)
        lse = (top - log_p.gather(1, at))[:, 0]
    # log_softmax adds a row up in order, off by five spacings of 16,450 classes; `sum`, which adds in pairs, finds
    # that. What was rounded to 16 bits is off by more
    off = torch.zeros_like(log_p_y)
    if logits.dtype == x.dtype:
        off = log_p.exp_().sum(-1).log()
        log_p_y, lse = log_p_y - off, lse + off
    elif grad is not None:
        log_p.exp_()
    g = log_p

    hit = torch.full_like(log_p_y, 1 - o.label_smoothing)
    if w is not None:
        hit = hit * w[label]
    slope, loss = hit, -hit * log_p_y
    z, z_slope = o.lse_square_scale * lse.square(), 2 * o.lse_square_scale * lse
    if smooth:
        weight_all = n_classes if totals.weight_all is None else totals.weight_all
        loss = loss - smooth * (log_p_all - weight_all * off)
        slope = slope + smooth * weight_all
    factor = torch.ones_like(hit)
    if o.reduction == "mean":
        assert totals.count is not None
        factor = factor / (totals.count if totals.weight is None else totals.weight)
        z, z_slope = z / totals.count, z_slope / totals.count
    loss, slope, hit = loss * factor + z, slope * factor + z_slope, hit * factor
    if o.token_scaling:
        probability = log_p_y.exp()
        loss, z, slope, hit = (t * probability for t in (loss, z, slope, hit))
        factor = factor * probability

    _, z_loss, accuracy, predicted = out.columns
    out.loss.copy_(loss.masked_fill(ignored, 0))
    if z_loss is not None:
        z_loss.copy_(z.masked_fill(ignored, 0))
    if accuracy is not None or predicted is not None:
        best = x.argmax(-1).masked_fill(ignored, -1)
        for column, value in ((accuracy, (best == target) & ~ignored), (predicted, best)):
            if column is not None:
                column.copy_(value)
    if grad is None:
        return
    if row_scale is not None:
        slope, hit, factor = (t * row_scale.to(hit.dtype) for t in (slope, hit, factor))
    slope = (slope * torch.exp(-off)).masked_fill(out_of_range, torch.nan)[:, None]
    at = label[:, None]
    if grad.dtype == g.dtype and not smooth and tanh is None:  # straight to where it belongs
        at_label = g.gather(1, at) * slope - hit[:, None]
        torch.mul(g, slope, out=grad).scatter_(1, at, at_label)
    else:
        g.mul_(slope)
        if smooth:
            g -= (smooth * factor)[:, None] * (1 if w is None else w)
        g.scatter_(1, at, g.gather(1, at) - hit[:, None])
        if tanh is not None:
            g *= 1 - tanh.square()
        grad.copy_(g)
    if not can_look(ignored) or ignored.any():  # else a pass is saved
        grad.masked_fill_(ignored[:, None], 0)


def statistics(
    logits: Tensor,
    target: Tensor,
    *,
    first: int,
    options: CrossEntropyOptions,
    out: Tensor,
    padded: bool,
) -> None:
    x, _ = _capped(logits, options.softcap)
    top, best = x.max(-1)
    total = (x - top.masked_fill(top == -torch.inf, 0)[:, None]).exp_().sum(-1)
    label, is_here = on_shard(target, first, logits.shape[1])
    x_y = x.gather(1, label[:, None])[:, 0].masked_fill(~is_here, 0)
    torch.stack((top, total, x_y, x.sum(-1), (best + first).to(x.dtype)), out=out)


def gradient(
    logits: Tensor,
    target: Tensor,
    factors: Tensor,
    *,
    first: int,
    options: CrossEntropyOptions,
    grad: Tensor,
    padded: bool,
) -> None:
    x, tanh = _capped(logits, options.softcap)
    top, slope, hit, share = factors[:, :, None]
    g = (x - top).exp_() * slope - share
    label, is_here = on_shard(target, first, logits.shape[1])
    g.scatter_add_(1, label[:, None], -hit * is_here[:, None])
    if tanh is not None:
        g *= 1 - tanh.square()
    grad.copy_(g.masked_fill_((target == options.ignore_index)[:, None], 0))


def _capped(logits: Tensor, softcap: float | None) -> tuple[Tensor, Tensor | None]:
    """The logits, at least fp32, and their tanh where there is a soft-cap."""
    x = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if softcap is None:
        return x, None
    tanh = torch.tanh(x / softcap)
    return softcap * tanh, tanh


def on_shard(target: Tensor, first: int, n_classes: int) -> tuple[Tensor, Tensor]:
    """The columns of the labels, and whether they are here."""
    label = target - first
    return label.clamp(0, n_classes - 1), (label >= 0) & (label < n_classes)
