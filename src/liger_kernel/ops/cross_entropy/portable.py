"""The step of cross entropy in plain PyTorch, for every device without kernels of its own. See `contract.Kernels`."""

from __future__ import annotations

import torch
from torch import Tensor

from liger_kernel.backends import can_look
from liger_kernel.ops.cross_entropy.contract import CrossEntropyOptions, CrossEntropyRows, Totals
from liger_kernel.ops.cross_entropy.reference import FAR


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
    if not can_look(shift) or shift.any():  # where looking costs no wait, a pass is saved
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
    g = x.softmax(-1).mul_(slope.masked_fill(out_of_range, torch.nan)[:, None])
    if smooth:
        g -= (smooth * factor)[:, None] * (1 if w is None else w)
    g.scatter_(1, label[:, None], g.gather(1, label[:, None]) - hit[:, None])
    if tanh is not None:
        g *= 1 - tanh.square()
    if row_scale is not None:
        g *= row_scale.to(g.dtype)[:, None]
    grad.copy_(g.masked_fill_(ignored[:, None], 0))
