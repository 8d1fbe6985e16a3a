"""The GRPO family of losses as pure functions of per-token log-probabilities.

Shapes: b sequences of a chunk, T tokens; log-probabilities and masks (b, T), advantages (b,), (b, 1) or (b, T). Tokens
outside the mask are taken out before anything is exponentiated, so that what stands there cannot turn into NaN.
"""

from __future__ import annotations

import inspect
import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from liger_kernel._core.autograd import is_transformed
from liger_kernel.backends import facts_of
from liger_kernel.chunked_loss.engine import of_sequences_or_tokens
from liger_kernel.chunked_loss.fused_linear_ppo import LigerFusedLinearPPOBase
from liger_kernel.chunked_loss.options import LossOptions
from liger_kernel.ops.grpo_loss.contract import CLIPPED, LOSS_TYPES, TOKEN_LEVEL_ONLY
from liger_kernel.ops.grpo_loss.reference import token_terms

#: options of `token_terms`
TERMS = [
    name
    for name, p in inspect.signature(token_terms).parameters.items()
    if p.kind is p.KEYWORD_ONLY
]
GAMMAS = ("k_pos", "lambda_pos", "k_neg", "lambda_neg")
MAX_LOG_RATIO, MIN_RATIO = 20.0, 1e-8
STEEPEST = 2.0**120


@dataclass(frozen=True)
class GRPOOptions(LossOptions):
    """beta: weight of the KL divergence to the reference; 0 needs no reference.
    compiled, chunk_size: accepted, without effect; ValueError for a chunk_size that is no positive integer.
    max_completion_length: the divisor of dr_grpo; without effect on the others, since trainers pass it to all.
    use_ref_model: compute the reference's log-probabilities where they are not passed.
    epsilon_low, epsilon_high: the ratio is clipped to [1 - low, 1 + high]; cispo: to at most `epsilon_high`.
    loss_type: one of grpo, bnpo, dr_grpo (needs max_completion_length), dapo, cispo, sapo, luspo, vespo. An option of
    one that another was chosen without is refused.
    importance_sampling_level: "token", or "sequence" (GSPO, arXiv 2507.18071; not for cispo, sapo, vespo).
    temperature: the logits are divided by it, as they were when the tokens were sampled.
    delta: upper bound of the ratio in the term that is not clipped (two-sided clipping).
    use_bias_correction_kl: weigh the KL estimate by the importance ratio.

    Raises: ValueError for unknown names, for temperatures, a delta or a length that are not positive, and for options
    that the loss_type does not read."""

    positive = (
        "temperature",
        "sapo_temperature_pos",
        "sapo_temperature_neg",
        "delta",
        "max_completion_length",
    )
    read_by: ClassVar = {
        "epsilon_low": CLIPPED,
        "epsilon_high": (*CLIPPED, "cispo"),
        "delta": CLIPPED,
        **dict.fromkeys(("sapo_temperature_pos", "sapo_temperature_neg"), ("sapo",)),
        **dict.fromkeys(
            ("vespo_k_pos", "vespo_lambda_pos", "vespo_k_neg", "vespo_lambda_neg"), ("vespo",)
        ),
    }

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
        super().__post_init__()

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
    """w^k e^(lambda (1 - w)) of the sequence ratio w of VESPO, (b, 1), or (b, T) for advantages of tokens."""
    smallest = math.log(MIN_RATIO)
    log_w = (log_ratio_per_token.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO) * mask).sum(-1, keepdim=True)
    if importance_sampling_ratio is not None:
        log_w = log_w + importance_sampling_ratio.log().clamp(smallest, MAX_LOG_RATIO).sum(
            -1, keepdim=True
        )
    log_w = log_w.clamp(smallest, MAX_LOG_RATIO)
    good = (advantages if advantages.ndim == 2 else advantages.unsqueeze(-1)) >= 0
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
    dtype, logps = logps.dtype, _unbounded(logps)
    inside = mask != 0
    if options.loss_type == "luspo":  # which averages over the padding of a sequence too
        inside = inside.any(1, keepdim=True).expand_as(inside)

    def counted(t: Tensor, otherwise: float = 0.0) -> Tensor:
        """(b, T) or (b, 1) in the dtype of the computation, with `otherwise` where no token counts."""
        counts = inside if t.shape == inside.shape else inside.any(1, keepdim=True)
        return t.to(logps.dtype).masked_fill(~counts, otherwise)

    logps = counted(logps)
    old_logps = None if old_logps is None else counted(old_logps)
    ref_logps = None if ref_logps is None else counted(ref_logps)
    advantages = counted(of_sequences_or_tokens("advantages", advantages, mask))
    if vllm_is_ratio is not None:
        vllm_is_ratio = of_sequences_or_tokens("vllm_is_ratio", vllm_is_ratio, mask).to(logps.dtype)
        # VESPO multiplies the ratios of padding, too, where they are numbers
        vllm_is_ratio = torch.where(
            vllm_is_ratio.isfinite(), vllm_is_ratio, counted(vllm_is_ratio, 1.0)
        )
    mask = mask.to(logps.dtype)
    log_ratio = logps - (logps.detach() if old_logps is None else old_logps)
    log_weight = log_ratio
    if options.importance_sampling_level == "sequence":
        log_weight = (log_ratio * mask).sum(1, keepdim=True) / mask.sum(1, keepdim=True).clamp(
            min=1.0
        )
    weight = vllm_is_ratio
    if options.loss_type == "vespo":
        gammas = (getattr(options, f"vespo_{name}") for name in GAMMAS)
        weight = get_gamma_weights(advantages, log_ratio, mask, vllm_is_ratio, *gammas)
    loss, kl, clips = token_terms(
        logps, log_weight, advantages, weight, ref_logps, **{n: getattr(options, n) for n in TERMS}
    )
    tokens = full_mask.sum().to(logps.dtype).clamp(min=1.0)
    metrics = []
    if kl is not None:
        metrics.append((kl.detach() * mask).sum() / tokens)
    metrics.append((clips * mask).sum() / tokens)
    loss = _reduce(options, loss, mask, full_mask, num_items_in_batch)
    return _rounded(loss, dtype), [_rounded(metric, dtype) for metric in metrics]


def _unbounded(logps: Tensor) -> Tensor:
    """In float64 where the device has it: e^89, of a token that drifted far from its reference, is beyond fp32.

    A slope of more than STEEPEST would leave no room for the matrix products, whose sums would be inf - inf.
    """
    wide = logps.to(torch.float64) if _has_float64(logps.device) else logps
    if wide.requires_grad and not is_transformed():
        wide.register_hook(lambda grad: grad.clamp(-STEEPEST, STEEPEST))
    return wide


@torch.compiler.assume_constant_result
def _has_float64(device: torch.device) -> bool:
    return facts_of(device).float64


def _rounded(value: Tensor, dtype: torch.dtype) -> Tensor:
    """In `dtype`; what is beyond its largest number becomes that number, with the gradient that it has."""
    largest, fixed = torch.finfo(dtype).max, value.detach()
    bounded = fixed.clamp(-largest, largest) + (value - fixed)
    return torch.where(fixed.isfinite(), bounded, value).to(dtype)


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
