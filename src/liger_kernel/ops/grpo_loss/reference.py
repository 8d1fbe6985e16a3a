"""The GRPO family of losses of given logits in plain PyTorch: the specification."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

NOT_COUNTED = -1  # the id of a token that counts for nothing


def k3_loss_fn(log_p: Tensor, log_q: Tensor) -> Tensor:
    """e^(log_p - log_q) - (log_p - log_q) - 1: KL(q || p) estimated from samples of q (Schulman's k3)."""
    difference = log_p - log_q
    return bounded_exp(difference) - difference - 1.0


def sapo_loss_fn(importance_ratio: Tensor, temperature: float) -> Tensor:
    """Soft gate of the ratio, with slope 1 at ratio 1 (arXiv 2511.20347)."""
    if temperature <= 0:
        raise ValueError(f"sapo_temperature must be > 0. Got {temperature}.")
    return torch.sigmoid(temperature * (importance_ratio - 1)) * 4 / temperature


def clip_coef_fn(
    coef: Tensor, epsilon_low: float, epsilon_high: float, loss_type: str
) -> tuple[Tensor | None, Tensor, Tensor]:
    """The clipped ratio (None where the loss clips nothing), and where it is below and above its bounds."""
    never = torch.zeros_like(coef, dtype=torch.bool)
    if loss_type == "cispo":
        return coef.clamp(max=epsilon_high).detach(), never, coef > epsilon_high
    if loss_type in ("sapo", "vespo"):
        return None, never, never
    low, high = 1 - epsilon_low, 1 + epsilon_high
    return coef.clamp(low, high), coef < low, coef > high


def bounded_exp(x: Tensor) -> Tensor:
    """At most about the largest number of the dtype: a token without an advantage would make NaN of infinity."""
    return x.clamp(max=int(math.log(torch.finfo(x.dtype).max))).exp()


def token_terms(
    logps: Tensor,
    log_ratio: Tensor,
    advantages: Tensor,
    weight: Tensor | None = None,
    ref_logps: Tensor | None = None,
    *,
    loss_type: str = "grpo",
    beta: float = 0.0,
    epsilon_low: float = 0.2,
    epsilon_high: float = 0.2,
    delta: float | None = None,
    sapo_temperature_pos: float = 1.0,
    sapo_temperature_neg: float = 1.05,
    use_bias_correction_kl: bool = False,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """The loss of tokens, their KL divergence (None with beta 0), and which of them were clipped.

    With w the weight, A the advantage, r = e^log_ratio, and r' the ratio where it is clipped, the loss is

        w max(-r A, -r' A)    (r bounded by delta)      cispo: -w r' A logp, r' constant
        sapo: -w 4 sigmoid(t (r - 1)) / t A             vespo: -w A logp

    plus beta times k3, times r with `use_bias_correction_kl`. log_ratio: of tokens, or of their sequence.
    """
    ratio = bounded_exp(log_ratio)
    clipped, below, above = clip_coef_fn(ratio, epsilon_low, epsilon_high, loss_type)
    if loss_type == "cispo":
        assert clipped is not None
        loss = -clipped * advantages * logps
    elif loss_type == "sapo":
        good = sapo_loss_fn(ratio, sapo_temperature_pos)
        bad = sapo_loss_fn(ratio, sapo_temperature_neg)
        loss = -torch.where(advantages > 0, good, bad) * advantages
    elif loss_type == "vespo":
        loss = -advantages * logps
    else:
        assert clipped is not None
        within = ratio if delta is None else ratio.clamp(max=delta)
        loss = -torch.minimum(within * advantages, clipped * advantages)
    if weight is not None:
        loss = loss * weight
    kl = None
    if beta != 0.0:
        kl = k3_loss_fn(logps.detach() if ref_logps is None else ref_logps, logps)
        if use_bias_correction_kl:
            kl = kl * ratio
        loss = loss + beta * kl
    return loss, kl, (below & (advantages < 0)) | (above & (advantages > 0))


def grpo_loss(
    logits: Tensor,
    token_ids: Tensor,
    old_logps: Tensor | None,
    ref_logps: Tensor | None,
    advantages: Tensor | None,
    weight: Tensor | None,
    sum_weight: Tensor | None,
    *,
    loss_type: str = "grpo",
    temperature: float = 1.0,
    in_place: bool = False,
    **options: Any,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Loss, KL divergence and clipping of each token (R,), all fp32 (float64 for float64 logits), by `token_terms`.

    loss_type "logps": the log-probabilities alone, in place of the loss. With sum_weight, the sum of the loss times
    that. A token whose id is NOT_COUNTED has 0 in all; another id that is no class gives NaN. `in_place` changes no
    result.
    """
    wide = torch.promote_types(logits.dtype, torch.float32)
    counts = token_ids != NOT_COUNTED
    x = logits.to(wide).masked_fill(~counts[:, None], 0) / temperature
    n_classes = x.shape[1]
    logps = x.log_softmax(-1).gather(1, token_ids.clamp(0, n_classes - 1)[:, None])[:, 0]
    logps = logps.masked_fill((token_ids < 0) & counts | (token_ids >= n_classes), torch.nan)

    def counted(t: Tensor | None) -> Any:
        return None if t is None else t.to(wide).masked_fill(~counts, 0)

    loss, kl, clipped = logps, None, None
    if loss_type != "logps":
        old = logps.detach() if old_logps is None else counted(old_logps)
        of_token = counted(advantages), counted(weight), counted(ref_logps)
        loss, kl, clipped = token_terms(
            logps, logps - old, *of_token, loss_type=loss_type, **options
        )
    loss = counted(loss)
    if sum_weight is not None:
        loss = (loss * sum_weight).sum()
    return loss, counted(None if kl is None else kl.detach()), counted(clipped)
