"""Cross entropy in plain PyTorch: the specification."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

#: a row whose largest logit is further from 0 is shifted: its logsumexp would lose the logarithm of the sum
FAR = 2.0**16
Terms = tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]


def terms(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    lse_square_scale: float = 0.0,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
    softcap: float | None = None,
    return_z_loss: bool = False,
    return_token_accuracy: bool = False,
    return_predicted_tokens: bool = False,
    token_scaling: bool = False,
) -> Terms:
    """Loss, z-loss, accuracy and prediction in the compute dtype, which is fp32, or float64 for float64 logits.

    With x the row after the soft-cap c tanh(x / c), y its label, w the class weights (1 without), s the z-loss scale,
    a the label smoothing and V classes, a row that is not ignored has

        loss = (1 - a) w_y (lse - x_y) + a / V (lse sum_v w_v - sum_v w_v x_v) + z,    z = s lse^2,

    and "mean" divides z by the number of such rows, the rest by the sum of their w_y. `token_scaling` multiplies loss
    and z of a row by its detached probability exp(x_y - lse). A label outside [0, V) gives NaN.
    """
    x = logits.to(torch.promote_types(logits.dtype, torch.float32))
    n_classes = x.shape[1]
    valid = target != ignore_index
    in_range = (target >= 0) & (target < n_classes)
    label = target.clamp(0, n_classes - 1)
    x = x.masked_fill(~valid[:, None], 0)  # an ignored row counts for nothing, whatever it holds
    if softcap is not None:
        x = softcap * torch.tanh(x / softcap)
    top = x.detach().amax(-1)
    shift = top.masked_fill(top.abs() < FAR, 0)
    x = x - shift[:, None]
    lse = x.logsumexp(-1)
    x_y = x.gather(1, label[:, None])[:, 0].masked_fill(~in_range, torch.nan)
    w = x.new_ones(n_classes) if weight is None else weight.to(x.dtype)
    w_y = w[label]
    loss = w_y * (lse - x_y)
    if label_smoothing:
        smooth = lse * w.sum() - (x * w).sum(-1)
        loss = (1 - label_smoothing) * loss + label_smoothing / n_classes * smooth
    z = torch.zeros_like(lse)
    if lse_square_scale:
        z = lse_square_scale * (lse + shift).square()
    count = valid.sum()
    if reduction == "mean":
        total = count if weight is None else w_y.masked_fill(~valid, 0).sum()
        loss = loss / total.masked_fill(count == 0, 1)
        z = z / count.clamp(min=1)
    loss = loss + z
    if token_scaling:
        probability = torch.exp(x_y - lse).detach()
        loss, z = loss * probability, z * probability
    loss, z = loss.masked_fill(~valid, 0), z.masked_fill(~valid, 0)
    predicted = x.argmax(-1).masked_fill(~valid, -1)
    accuracy = ((predicted == target) & valid).to(torch.float32)
    if reduction != "none":
        loss, z, accuracy = loss.sum(), z.sum(), accuracy.sum() / count.clamp(min=1)
    return (
        loss,
        z.detach() if return_z_loss else None,
        accuracy if return_token_accuracy else None,
        predicted if return_predicted_tokens else None,
    )


def cross_entropy(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    *,
    in_place: bool = False,
    **options: Any,
) -> Terms:
    """`terms` with loss and z-loss rounded to the dtype of the logits, which `in_place` leaves as they are."""
    loss, z_loss, accuracy, predicted = terms(logits, target, weight, **options)
    rounded = None if z_loss is None else z_loss.to(logits.dtype)
    return loss.to(logits.dtype), rounded, accuracy, predicted
