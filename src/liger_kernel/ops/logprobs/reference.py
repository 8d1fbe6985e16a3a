"""Log-probabilities and other numbers of a softmax in plain PyTorch: the specification."""

from __future__ import annotations

import math

import torch
from torch import Tensor

Columns = tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]


def logprobs(
    logits: Tensor,
    ids: Tensor,
    temperatures: Tensor | None = None,
    ignore_index: int = -100,
    temperature: float = 1.0,
    softcap: float | None = None,
    scale: float = 1.0,
    entropy: bool = False,
    logsumexp: bool = False,
    sum_p2: bool = False,
    mean_logit: bool = False,
    top1: bool = False,
    top_k: int = 0,
) -> Columns:
    """The numbers asked for (N, K), whether the label has the largest logit, the largest log-probabilities, their ids.

    Of a row whose label y is not ignored, with x its logits,

        z = softcap tanh(scale x / softcap) / temperature,    l = log softmax(z),    p = exp(l),

    the numbers are l_y, -sum p l, logsumexp(z), sum p^2 and mean(z). They are 0 for a row that is ignored, and the
    first is NaN for a label outside [0, V). A temperature is that of all rows, or one of `temperatures` (N,).
    """
    n_classes = logits.shape[1]
    valid = ids != ignore_index
    out_of_range = (ids < 0) | (ids >= n_classes)
    # an ignored row counts for nothing, whatever it holds
    x = logits.to(torch.promote_types(logits.dtype, torch.float32)).masked_fill(~valid[:, None], 0)
    tau = temperature if temperatures is None else temperatures.to(x.dtype)[:, None]
    z = scale * x
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    z = z / tau
    log_p = z.log_softmax(-1)
    p = log_p.exp()
    label = ids.clamp(0, n_classes - 1)[:, None]
    numbers = [log_p.gather(1, label)[:, 0].masked_fill(out_of_range & valid, torch.nan)]
    if entropy:
        terms = p * log_p.masked_fill(log_p == -torch.inf, 0)
        # a sum rounds to more than there can be
        most = math.log(n_classes) * (1 - torch.finfo(x.dtype).eps)
        numbers.append((-terms.sum(-1)).clamp(max=most))
    if logsumexp:
        numbers.append(z.logsumexp(-1))
    if sum_p2:
        numbers.append(p.square().sum(-1))
    if mean_logit:
        numbers.append(z.mean(-1))
    found = torch.stack(numbers, -1).masked_fill(~valid[:, None], 0)
    is_top1 = top_log_probs = top_ids = None
    if top1:
        is_top1 = (z.argmax(-1) == ids) & valid
    if top_k:
        top_log_probs, top_ids = log_p.detach().topk(top_k, -1)
        top_log_probs = top_log_probs.masked_fill(~valid[:, None], 0)
        top_ids = top_ids.masked_fill(~valid[:, None], -1)
    return found, is_top1, top_log_probs, top_ids
