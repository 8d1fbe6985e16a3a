"""GRPO (arXiv 2402.03300) and its relatives on the hidden states of sampled completions."""

from __future__ import annotations

import warnings
from dataclasses import fields
from typing import Any

import torch.nn as nn
from torch import Tensor

from liger_kernel.chunked_loss.engine import (
    check_chunk_size,
    check_sequences,
    loss_of_logps,
    reference_token_logps,
)
from liger_kernel.chunked_loss.fused_linear_ppo import LigerFusedLinearPPOBase
from liger_kernel.chunked_loss.policy import (
    Policy,
    clip_coef_fn,
    get_gamma_weights,
    k3_loss_fn,
    policy_loss,
    sapo_loss_fn,
    sequence_ratio,
)
from liger_kernel.chunked_loss.preference import LossAndMetrics

__all__ = [
    "LigerFusedLinearGRPOFunction",
    "LigerFusedLinearGRPOLoss",
    "clip_coef_fn",
    "get_gamma_weights",
    "k3_loss_fn",
    "sapo_loss_fn",
]

OPTIONS = tuple(field.name for field in fields(Policy))
OUTSIDE = -100  # stands for tokens that no loss reads


class LigerFusedLinearGRPOFunction(LigerFusedLinearPPOBase):
    """`apply` in the argument order of the incumbent."""

    @staticmethod
    def ppo_loss_fn(
        per_token_logps: Tensor,
        attention_mask: Tensor,
        advantages: Tensor,
        full_attention_mask: Tensor,
        ref_per_token_logps: Tensor | None = None,
        old_per_token_logps: Tensor | None = None,
        *,
        vllm_is_ratio: Tensor | None = None,
        num_items_in_batch: Tensor | float | None = None,
        **options: Any,
    ) -> tuple[Tensor, list[Tensor]]:
        """The loss from log-probabilities (b, T); `options` are the fields of `policy.Policy`."""
        return policy_loss(
            Policy(**options),
            per_token_logps,
            attention_mask,
            advantages,
            full_attention_mask,
            ref_per_token_logps,
            old_per_token_logps,
            vllm_is_ratio,
            num_items_in_batch,
        )

    @staticmethod
    def apply(
        _input: Tensor,
        weight: Tensor,
        selected_token_ids: Tensor,
        attention_mask: Tensor,
        advantages: Tensor,
        bias: Tensor | None = None,
        ref_per_token_logps: Tensor | None = None,
        old_per_token_logps: Tensor | None = None,
        ref_input: Tensor | None = None,
        ref_weight: Tensor | None = None,
        ref_bias: Tensor | None = None,
        beta: float = 0.04,
        epsilon_low: float = 0.2,
        epsilon_high: float = 0.2,
        loss_type: str = "dapo",
        max_completion_length: int | None = None,
        importance_sampling_level: str = "token",
        sapo_temperature_pos: float = 1.0,
        sapo_temperature_neg: float = 1.05,
        temperature: float = 1.0,
        compiled: bool = True,
        use_ref_model: bool = True,
        chunk_size: int = 1,
        vllm_is_ratio: Tensor | None = None,
        delta: float | None = None,
        use_bias_correction_kl: bool = False,
        vespo_k_pos: float = 2.0,
        vespo_lambda_pos: float = 3.0,
        vespo_k_neg: float = 3.0,
        vespo_lambda_neg: float = 2.0,
        num_items_in_batch: Tensor | float | None = None,
    ) -> LossAndMetrics:
        policy = Policy(
            epsilon_low,
            epsilon_high,
            beta,
            loss_type,
            max_completion_length,
            importance_sampling_level,
            sapo_temperature_pos,
            sapo_temperature_neg,
            delta,
            use_bias_correction_kl,
            vespo_k_pos,
            vespo_lambda_pos,
            vespo_k_neg,
            vespo_lambda_neg,
        )
        check_chunk_size(chunk_size)
        return _grpo(
            policy,
            (_input, weight, bias),
            (ref_input, ref_weight, ref_bias) if use_ref_model else None,
            selected_token_ids,
            attention_mask,
            advantages,
            ref_per_token_logps,
            old_per_token_logps,
            vllm_is_ratio,
            num_items_in_batch,
            temperature,
        )


def _grpo(
    policy: Policy,
    model: tuple[Tensor, Tensor, Tensor | None],
    ref_model: tuple[Tensor | None, Tensor | None, Tensor | None] | None,
    token_ids: Tensor,
    mask: Tensor,
    advantages: Tensor,
    ref_logps: Tensor | None,
    old_logps: Tensor | None,
    vllm_is_ratio: Tensor | None,
    num_items_in_batch: Tensor | float | None,
    temperature: float,
) -> LossAndMetrics:
    hidden, weight, bias = model
    check_sequences(hidden, token_ids)
    policy.check_length()
    batch, length = token_ids.shape
    if mask.shape != token_ids.shape or advantages.shape != (batch,):
        raise ValueError(
            f"attention_mask has shape {tuple(mask.shape)} and advantages {tuple(advantages.shape)}, "
            f"not {(batch, length)} and {(batch,)}."
        )
    ratio = sequence_ratio(vllm_is_ratio, batch, length)
    if policy.loss_type != "luspo":  # which reads the tokens outside the mask as well
        token_ids = token_ids.masked_fill(mask == 0, OUTSIDE)
    if ref_model is not None and policy.beta != 0.0:
        ref_input, ref_weight, ref_bias = ref_model
        if ref_logps is not None and ref_input is not None:
            warnings.warn(
                "Both ref_per_token_logps and ref_input are given; ref_per_token_logps is used.",
                stacklevel=3,
            )
        if ref_logps is None:
            if ref_input is None or ref_weight is None:
                raise ValueError(
                    "use_ref_model=True, but there is neither ref_per_token_logps nor ref_input with ref_weight; "
                    "pass one of them, or use_ref_model=False."
                )
            ref_logps = reference_token_logps(
                (ref_input, ref_weight, ref_bias), token_ids, OUTSIDE, temperature
            )
    if num_items_in_batch is None and policy.per_token_of_all_ranks:  # once, not per chunk
        num_items_in_batch = LigerFusedLinearPPOBase._tokens_of_all_ranks(mask)

    def of_logps(logps: Tensor) -> tuple[Tensor, list[Tensor]]:
        return policy_loss(
            policy,
            logps,
            mask,
            advantages,
            mask,
            None if ref_logps is None else ref_logps.detach(),
            None if old_logps is None else old_logps.detach(),
            ratio,
            num_items_in_batch,
        )

    unit = length if policy.reads_sequences else 1
    return loss_of_logps(of_logps, hidden, weight, token_ids, bias, OUTSIDE, temperature, unit=unit)


class LigerFusedLinearGRPOLoss(nn.Module):
    """GRPO, BNPO, Dr. GRPO, DAPO, CISPO, SAPO, LUSPO and VESPO on hidden states.

    Args:
        beta: weight of the KL divergence to the reference; 0 needs no reference.
        epsilon_low, epsilon_high: the ratio is clipped to [1 - low, 1 + high]; cispo: to at most `epsilon_high`.
        loss_type: one of grpo, bnpo, dr_grpo (needs max_completion_length), dapo, cispo, sapo, luspo, vespo.
        importance_sampling_level: "token", or "sequence" (GSPO, arXiv 2507.18071; not for cispo, sapo, vespo).
        temperature: the logits are divided by it, as they were when the tokens were sampled.
        delta: upper bound of the ratio in the term that is not clipped (two-sided clipping).
        use_bias_correction_kl: weigh the KL estimate by the importance ratio.
        compiled, chunk_size: accepted; neither has an effect.

    Raises: ValueError for unknown names, for temperatures of SAPO or a delta that are not positive.
    """

    def __init__(
        self,
        beta: float = 0.04,
        compiled: bool = True,
        use_ref_model: bool = True,
        chunk_size: int = 1,
        epsilon_low: float = 0.2,
        epsilon_high: float = 0.2,
        loss_type: str = "dapo",
        max_completion_length: int | None = None,
        importance_sampling_level: str = "token",
        sapo_temperature_pos: float = 1.0,
        sapo_temperature_neg: float = 1.05,
        temperature: float = 1.0,
        delta: float | None = None,
        use_bias_correction_kl: bool = False,
        vespo_k_pos: float = 2.0,
        vespo_lambda_pos: float = 3.0,
        vespo_k_neg: float = 3.0,
        vespo_lambda_neg: float = 2.0,
    ):
        super().__init__()
        check_chunk_size(chunk_size)
        policy = Policy(
            epsilon_low,
            epsilon_high,
            beta,
            loss_type,
            max_completion_length,
            importance_sampling_level,
            sapo_temperature_pos,
            sapo_temperature_neg,
            delta,
            use_bias_correction_kl,
            vespo_k_pos,
            vespo_lambda_pos,
            vespo_k_neg,
            vespo_lambda_neg,
        )
        for name in OPTIONS:
            setattr(self, name, getattr(policy, name))
        self.compiled = compiled
        self.use_ref_model = use_ref_model
        self.chunk_size = chunk_size
        self.temperature = temperature

    def forward(
        self,
        _input: Tensor,
        lin_weight: Tensor,
        selected_token_ids: Tensor,
        attention_mask: Tensor,
        advantages: Tensor,
        bias: Tensor | None = None,
        ref_per_token_logps: Tensor | None = None,
        old_per_token_logps: Tensor | None = None,
        ref_input: Tensor | None = None,
        ref_weight: Tensor | None = None,
        ref_bias: Tensor | None = None,
        vllm_is_ratio: Tensor | None = None,
        num_items_in_batch: Tensor | float | None = None,
    ) -> LossAndMetrics:
        """Loss, and (mean KL, clip ratio), or (clip ratio,) with beta=0.

        _input: (B, T, H). selected_token_ids: (B, T). attention_mask: (B, T), which tokens count, may be float.
        advantages: (B,). vllm_is_ratio: (B,), (B, 1) or (B, T), multiplies the loss before the KL.
        num_items_in_batch: tokens of all ranks, the divisor of dapo, cispo and vespo.
        Without old_per_token_logps the ratio is 1, with the gradient of the log-probability.
        """
        return _grpo(
            Policy(**{name: getattr(self, name) for name in OPTIONS}),
            (_input, lin_weight, bias),
            (ref_input, ref_weight, ref_bias) if self.use_ref_model else None,
            selected_token_ids,
            attention_mask,
            advantages,
            ref_per_token_logps,
            old_per_token_logps,
            vllm_is_ratio,
            num_items_in_batch,
            self.temperature,
        )
