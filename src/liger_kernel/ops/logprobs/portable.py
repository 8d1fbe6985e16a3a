"""The step of log-probabilities in plain PyTorch, for devices without kernels of their own. See `contract.Kernels`."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from liger_kernel.ops.cross_entropy.portable import on_shard, row_blocks
from liger_kernel.ops.logprobs.contract import NUMBERS, LogProbRows, LogProbsOptions


def step(
    logits: Tensor,
    ids: Tensor,
    temperature: Tensor | None,
    *,
    options: LogProbsOptions,
    out: LogProbRows,
    lse: Tensor | None,
    grad: Tensor | None,
    row_scale: Tensor | None,
    padded: bool,
) -> None:
    for at in row_blocks(logits):
        of_rows = (None if t is None else t[at] for t in (temperature, lse, grad, row_scale))
        _step(logits[at], ids[at], options, out[at], *of_rows)


def _step(
    logits: Tensor,
    ids: Tensor,
    o: LogProbsOptions,
    out: LogProbRows,
    temperature: Tensor | None,
    lse: Tensor | None,
    grad: Tensor | None,
    row_scale: Tensor | None,
) -> None:
    n_classes = logits.shape[1]
    ignored = ids == o.ignore_index
    out_of_range = (ids < 0) | (ids >= n_classes)  # NaN, in the log-probability and in the gradient
    label = ids.clamp(0, n_classes - 1)[:, None]
    z, tau, tanh = _scaled(logits, o, temperature)
    log_p = z.log_softmax(-1)
    p = log_p.exp()
    found = {"log_prob": log_p.gather(1, label)[:, 0].masked_fill(out_of_range, torch.nan)}
    if o.logsumexp or lse is not None:
        found["logsumexp"] = z.logsumexp(-1)
    if o.entropy:
        log_p.masked_fill_(log_p == -torch.inf, 0)  # times p it is 0
        most = math.log(n_classes) * (1 - torch.finfo(z.dtype).eps)
        found["entropy"] = -torch.linalg.vecdot(p, log_p).clamp(min=-most)
    if o.sum_p2:
        found["sum_p2"] = torch.linalg.vecdot(p, p)
    if o.mean_logit:
        found["mean_logit"] = z.mean(-1)
    numbers, is_top1 = out.loss, out.columns[1]
    for i, name in enumerate(o.numbers):
        numbers[:, i] = found[name].masked_fill(ignored, 0)
    if is_top1 is not None:
        is_top1.copy_((z.argmax(-1) == ids) & ~ignored)
    if lse is not None:
        lse.copy_(found["logsumexp"])
    if grad is None:
        return
    scales = torch.ones_like(numbers) if row_scale is None else row_scale.to(z.dtype)
    scales = scales / tau * o.scale
    g = dict(zip(o.numbers, scales.masked_fill(ignored[:, None], 0).unbind(1), strict=True))
    slope = -g["log_prob"].masked_fill(out_of_range & ~ignored, torch.nan)
    if o.logsumexp:
        slope = slope + g["logsumexp"]
    if o.entropy:
        slope = slope - g["entropy"] * found["entropy"]
    if o.sum_p2:
        slope = slope - 2 * g["sum_p2"] * found["sum_p2"]
    by = slope[:, None]
    if o.entropy:
        by = log_p.mul_(-g["entropy"][:, None]).add_(by)
    if o.sum_p2:
        by = by + (2 * g["sum_p2"])[:, None] * p
    d = p.mul_(by)
    if o.mean_logit:
        d += (g["mean_logit"] / n_classes)[:, None]
    d.scatter_add_(1, label, g["log_prob"][:, None])
    if tanh is not None:
        d *= 1 - tanh.square()
    grad.copy_(d.masked_fill_(ignored[:, None], 0))


def _scaled(
    logits: Tensor, o: LogProbsOptions, temperature: Tensor | None
) -> tuple[Tensor, Tensor | float, Tensor | None]:
    """z, at least fp32, the temperature of each row, and the tanh where there is a soft-cap."""
    z = logits.to(torch.promote_types(logits.dtype, torch.float32))
    tau = o.temperature if temperature is None else temperature.to(z.dtype)[:, None]
    tanh = None
    if o.scale != 1:
        z = o.scale * z
    if o.softcap is not None:
        tanh = torch.tanh(z / o.softcap)
        z = o.softcap * tanh
    if temperature is not None or o.temperature != 1:
        z = z / tau
    return z, tau, tanh


def statistics(
    logits: Tensor,
    ids: Tensor,
    temperature: Tensor | None,
    *,
    first: int,
    options: LogProbsOptions,
    out: Tensor,
    padded: bool,
) -> None:
    for at in row_blocks(logits):
        of_rows = None if temperature is None else temperature[at]
        _statistics(logits[at], ids[at], of_rows, first, options, out[:, at])


def _statistics(
    logits: Tensor,
    ids: Tensor,
    temperature: Tensor | None,
    first: int,
    options: LogProbsOptions,
    out: Tensor,
) -> None:
    z = _scaled(logits, options, temperature)[0]
    top, best = z.max(-1)
    below = z - top.masked_fill(top == -torch.inf, 0)[:, None]
    e = below.exp()
    label, is_here = on_shard(ids, first, z.shape[1])
    z_y = z.gather(1, label[:, None])[:, 0].masked_fill(~is_here, 0)
    weighted = torch.linalg.vecdot(e, below.masked_fill_(below == -torch.inf, 0))
    class_of_top = (best + first).to(z.dtype)
    squares = torch.linalg.vecdot(e, e)
    out.copy_(torch.stack((top, e.sum(-1), z_y, z.sum(-1), class_of_top, weighted, squares)))


def gradient(
    logits: Tensor,
    ids: Tensor,
    temperature: Tensor | None,
    factors: Tensor,
    *,
    first: int,
    options: LogProbsOptions,
    grad: Tensor,
    padded: bool,
) -> None:
    for at in row_blocks(logits):
        of_rows = None if temperature is None else temperature[at]
        _gradient(logits[at], ids[at], of_rows, factors[:, at], first, options, grad[at])


def _gradient(
    logits: Tensor,
    ids: Tensor,
    temperature: Tensor | None,
    factors: Tensor,
    first: int,
    options: LogProbsOptions,
    grad: Tensor,
) -> None:
    z, tau, tanh = _scaled(logits, options, temperature)
    top, a, b, c, mean, own = factors[:, :, None]
    below = z - top
    e = below.exp()
    d = e * (a + b * below.masked_fill_(below == -torch.inf, 0) + c * e) + mean
    label, is_here = on_shard(ids, first, z.shape[1])
    d.scatter_add_(1, label[:, None], own * is_here[:, None])
    d *= options.scale / tau
    if tanh is not None:
        d *= 1 - tanh.square()
    grad.copy_(d.masked_fill_((ids == options.ignore_index)[:, None], 0))


def write_numbers(
    said: Tensor, ids: Tensor, n_classes: int, *, options: LogProbsOptions, out: LogProbRows
) -> None:
    """What `step` writes to `out`, but for the `top_k`, from the statistics `said` (7, N) of all classes."""
    top, total, z_y, summed, best, weighted, squares = said
    log_total = total.log()
    log_prob = ((z_y - top) - log_total).clamp(max=0)
    most = math.log(n_classes) * (1 - torch.finfo(said.dtype).eps)
    numbers = {
        "log_prob": log_prob.masked_fill(_out_of_range(ids, n_classes), torch.nan),
        "entropy": (log_total - weighted / total).clamp(max=most),
        "logsumexp": top + log_total,
        "sum_p2": squares / total.square(),
        "mean_logit": summed / n_classes,
    }
    ignored = ids == options.ignore_index
    columns = torch.stack([numbers[name] for name in options.numbers], -1)
    out.loss.copy_(columns.masked_fill(ignored[:, None], 0))
    is_top1 = out.columns[1]
    if is_top1 is not None:
        is_top1.copy_((best == ids) & ~ignored)


def factors_of(
    said: Tensor,
    ids: Tensor,
    n_classes: int,
    row_scale: Tensor | None,
    *,
    options: LogProbsOptions,
) -> Tensor:
    """The factors of `Kernels.gradient` for the gradient of sum(numbers * row_scale), from the statistics `said`."""
    top, total, _, _, _, weighted, squares = said
    if row_scale is None:
        row_scale = top.new_ones(len(top), len(options.numbers))
    g = dict.fromkeys(NUMBERS, torch.zeros_like(top))
    g |= dict(zip(options.numbers, row_scale.unbind(1), strict=True))
    # log p + H = (z - top) - its mean under p
    a = g["logsumexp"] - g["log_prob"]
    if options.entropy:
        a = a + g["entropy"] * (weighted / total)
    if options.sum_p2:
        a = a - 2 * g["sum_p2"] * (squares / total.square())
    wrong = _out_of_range(ids, n_classes) & (ids != options.ignore_index)
    a = (a / total).masked_fill(wrong, torch.nan)
    b, c = -g["entropy"] / total, 2 * g["sum_p2"] / total.square()
    return torch.stack((top, a, b, c, g["mean_logit"] / n_classes, g["log_prob"]))


def _out_of_range(ids: Tensor, n_classes: int) -> Tensor:
    return (ids < 0) | (ids >= n_classes)
