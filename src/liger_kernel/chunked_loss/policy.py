"""The GRPO family of losses as pure functions of per-token log-probabilities.

Shapes: b sequences of a chunk, T tokens; log-probabilities and masks (b, T), advantages (b,). Tokens outside the mask
are taken out before anything is exponentiated, so that what stands there cannot turn into NaN.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from liger_kernel.chunked_loss.engine import check_chunk_size
from liger_kernel.chunked_loss.fused_linear_ppo import LigerFusedLinearPPOBase

LOSS_TYPES = ("grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "luspo", "vespo")
TOKEN_LEVEL_ONLY = ("cispo", "sapo", "vespo")
MAX_LOG_RATIO, MIN_RATIO = 20.0, 1e-8


@dataclass(frozen=True)
class GRPOOptions:
    """beta: weight of the KL divergence to the reference; 0 needs no reference.
    compiled, chunk_size: accepted, without effect; ValueError for a chunk_size that is no positive integer.
    use_ref_model: compute the reference's log-probabilities where they are not passed.
    epsilon_low, epsilon_high: the ratio is clipped to [1 - low, 1 + high]; cispo: to at most `epsilon_high`.
    loss_type: one of grpo, bnpo, dr_grpo (needs max_completion_length), dapo, cispo, sapo, luspo, vespo.
    importance_sampling_level: "token", or "sequence" (GSPO, arXiv 2507.18071; not for cispo, sapo, vespo).
    temperature: the logits are divided by it, as they were when the tokens were sampled.
    delta: upper bound of the ratio in the term that is not clipped (two-sided clipping).
    use_bias_correction_kl: weigh the KL estimate by the importance ratio.

    Raises: ValueError for unknown names, for temperatures of SAPO or a delta that are not positive."""

    beta: float = 0.04
    compiled: bool = True
    use_ref_model: bool = True
    chunk_size: int = 1
    epsilon_low: float = 0.2
    epsilon_high: float = 0.2
    loss_type: str = "dapo"
    max_completion_length: int | None = None
    importance_sampling_level: str = "token"
    sapo_temperature_pos: float = 1.0
    sapo_temperature_neg: float = 1.05
    temperature: float = 1.0
    delta: float | None = None
    use_bias_correction_kl: bool = False
    vespo_k_pos: float = 2.0
    vespo_lambda_pos: float = 3.0
    vespo_k_neg: float = 3.0
    vespo_lambda_neg: float = 2.0

    def __post_init__(self) -> None:
        check_chunk_size(self.chunk_size)
        if self.loss_type not in LOSS_TYPES:
            raise ValueError(
                f"Unknown loss type: {self.loss_type}. Known types are: {', '.join(LOSS_TYPES)}."
            )
        if self.importance_sampling_level not in ("token", "sequence"):
            raise ValueError(
                f"Unknown importance sampling level: {self.importance_sampling_level}. "
                f"Known levels are: token, sequence."
            )
        if self.importance_sampling_level == "sequence" and self.loss_type in TOKEN_LEVEL_ONLY:
            raise ValueError(
                f"Sequence-level importance sampling is not supported for loss_type={self.loss_type!r}. "
                f"Use importance_sampling_level='token' instead."
            )
        for name in ("sapo_temperature_pos", "sapo_temperature_neg", "delta"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ValueError(f"{name} must be positive, got {value}.")

    @property
    def reads_sequences(self) -> bool:
        """Whether the loss of a token reads the log-probabilities of others: those of its sequence."""
        return self.importance_sampling_level == "sequence" or self.loss_type == "vespo"

    @property
    def per_token_of_all_ranks(self) -> bool:
        """Whether the loss is divided by the number of tokens in the batches of all ranks."""
        return self.loss_type in ("dapo", "cispo", "vespo")

    def check_length(self) -> None:
        if self.loss_type == "dr_grpo" and self.max_completion_length is None:
            raise ValueError(
                "max_completion_length must be provided for loss_type 'dr_grpo', got None."
            )


def k3_loss_fn(log_p: Tensor, log_q: Tensor) -> Tensor:
    """e^(log_p - log_q) - (log_p - log_q) - 1: KL(q || p) estimated from samples of q (Schulman's k3)."""
    difference = log_p - log_q
    return difference.exp() - difference - 1.0


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


@torch.no_grad()
def get_gamma_weights(
    advantages: Tensor,
    log_ratio_per_token: Tensor,
    mask: Tensor,
    importance_sampling_ratio: Tensor | None = None,
    k_pos: float = 2.0,
    lambda_pos: float = 3.0,
    k_neg: float = 3.0,
    lambda_neg: float = 2.0,
) -> Tensor:
    """w^k e^(lambda (1 - w)) of the sequence ratio w, (b, 1) of VESPO."""
    smallest = math.log(MIN_RATIO)
    log_w = (log_ratio_per_token.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO) * mask).sum(-1, keepdim=True)
    if importance_sampling_ratio is not None:
        log_w = log_w + importance_sampling_ratio.log().clamp(smallest, MAX_LOG_RATIO).sum(
            -1, keepdim=True
        )
    log_w = log_w.clamp(smallest, MAX_LOG_RATIO)
    good = advantages.unsqueeze(-1) >= 0
    k = torch.where(good, k_pos, k_neg)
    rate = torch.where(good, lambda_pos, lambda_neg).clamp(min=1e-4)
    return (rate + k * log_w - rate * log_w.exp()).exp().nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)


def policy_loss(
    options: GRPOOptions,
    logps: Tensor,
    mask: Tensor,
    advantages: Tensor,
    full_mask: Tensor,
    ref_logps: Tensor | None = None,
    old_logps: Tensor | None = None,
    vllm_is_ratio: Tensor | None = None,
    num_items_in_batch: Tensor | float | None = None,
) -> tuple[Tensor, list[Tensor]]:
    """The loss of a chunk, normalised by the whole batch, and its metrics [mean KL if beta != 0, clip ratio]."""
    options.check_length()
    inside = mask != 0
    if options.loss_type != "luspo":  # which averages over padding too
        logps = logps.masked_fill(~inside, 0.0)
        old_logps = None if old_logps is None else old_logps.masked_fill(~inside, 0.0)
        ref_logps = None if ref_logps is None else ref_logps.masked_fill(~inside, 0.0)
    advantages = advantages.unsqueeze(1)  # (b, 1)
    mask = mask.to(logps.dtype)
    log_ratio = logps - (logps.detach() if old_logps is None else old_logps.to(logps.dtype))
    log_weight = log_ratio
    if options.importance_sampling_level == "sequence":
        log_weight = (log_ratio * mask).sum(1, keepdim=True) / mask.sum(1, keepdim=True).clamp(
            min=1.0
        )
    ratio = log_weight.exp()
    clipped, below, above = clip_coef_fn(
        ratio, options.epsilon_low, options.epsilon_high, options.loss_type
    )
    loss = _token_loss(options, logps, log_ratio, ratio, clipped, advantages, mask, vllm_is_ratio)
    if vllm_is_ratio is not None and options.loss_type != "vespo":
        if vllm_is_ratio.shape == mask.shape and options.loss_type != "luspo":
            vllm_is_ratio = vllm_is_ratio.masked_fill(~inside, 1.0)
        loss = loss * vllm_is_ratio

    tokens = full_mask.sum().to(logps.dtype).clamp(min=1.0)
    metrics = []
    if options.beta != 0.0:
        kl = k3_loss_fn(logps.detach() if ref_logps is None else ref_logps.to(logps.dtype), logps)
        if options.use_bias_correction_kl:
            kl = kl * ratio
        loss = loss + options.beta * kl
        metrics.append((kl.detach() * mask).sum() / tokens)
    clips = (below & (advantages < 0)) | (above & (advantages > 0))
    metrics.append((clips * mask).sum() / tokens)
    return _reduce(options, loss, mask, full_mask, num_items_in_batch), metrics


def _token_loss(
    options: GRPOOptions,
    logps: Tensor,
    log_ratio: Tensor,
    ratio: Tensor,
    clipped: Tensor | None,
    advantages: Tensor,
    mask: Tensor,
    vllm_is_ratio: Tensor | None,
) -> Tensor:
    if options.loss_type == "cispo":
        assert clipped is not None
        return -clipped * advantages * logps
    if options.loss_type == "sapo":
        gate = torch.where(
            advantages > 0,
            sapo_loss_fn(ratio, options.sapo_temperature_pos),
            sapo_loss_fn(ratio, options.sapo_temperature_neg),
        )
        return -gate * advantages
    if options.loss_type == "vespo":
        gamma = get_gamma_weights(
            advantages.squeeze(1),
            log_ratio,
            mask,
            vllm_is_ratio,
            options.vespo_k_pos,
            options.vespo_lambda_pos,
            options.vespo_k_neg,
            options.vespo_lambda_neg,
        )
        return -gamma * advantages * logps
    assert clipped is not None
    if options.delta is not None:
        ratio = ratio.clamp(max=options.delta)
    return -torch.minimum(ratio * advantages, clipped * advantages)


def _reduce(
    options: GRPOOptions,
    loss: Tensor,
    mask: Tensor,
    full_mask: Tensor,
    num_items_in_batch: Tensor | float | None,
) -> Tensor:
    batch = max(full_mask.shape[0], 1)
    if options.loss_type == "luspo":
        return (loss * mask.sum(1, keepdim=True)).sum() / (batch * max(loss.shape[1], 1))
    masked = loss * mask
    if options.loss_type in ("grpo", "sapo"):
        return (masked.sum(1) / mask.sum(1).clamp(min=1.0)).sum() / batch
    if options.loss_type == "bnpo":
        return masked.sum() / full_mask.sum().to(loss.dtype).clamp(min=1.0)
    if options.loss_type == "dr_grpo":
        assert options.max_completion_length is not None
        return masked.sum() / (batch * options.max_completion_length)
    return masked.sum() / LigerFusedLinearPPOBase._compute_dapo_normalizer(
        full_mask, num_items_in_batch
    )


def sequence_ratio(vllm_is_ratio: Tensor | None, batch: int, length: int) -> Tensor | None:
    """(B,), (B, 1) or (B, T) -> something that broadcasts over (B, T)."""
    if vllm_is_ratio is None:
        return None
    ratio = vllm_is_ratio.unsqueeze(1) if vllm_is_ratio.ndim == 1 else vllm_is_ratio
    if tuple(ratio.shape) not in ((batch, 1), (batch, length)):
        raise ValueError(
            f"vllm_is_ratio has shape {tuple(vllm_is_ratio.shape)}; "
            f"pass ({batch},), ({batch}, 1) or ({batch}, {length})."
        )
    return ratio.detach()
