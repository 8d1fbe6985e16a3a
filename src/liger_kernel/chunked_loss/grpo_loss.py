"""GRPO (arXiv 2402.03300) and its relatives on the hidden states of sampled completions."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from liger_kernel._core.declared import LossFunction, LossModule, takes
from liger_kernel.chunked_loss.engine import (
    check_sequences,
    loss_of_logps,
    of_sequences_or_tokens,
)
from liger_kernel.chunked_loss.fused_linear_ppo import LigerFusedLinearPPOBase, reference_logps
from liger_kernel.chunked_loss.policy import (
    GRPOOptions,
    get_gamma_weights,
    policy_loss,
)
from liger_kernel.chunked_loss.preference import LossAndMetrics
from liger_kernel.loss_head.label_count import count_labels
from liger_kernel.ops.grpo_loss.reference import clip_coef_fn, k3_loss_fn, sapo_loss_fn

__all__ = [
    "LigerFusedLinearGRPOFunction",
    "LigerFusedLinearGRPOLoss",
    "clip_coef_fn",
    "get_gamma_weights",
    "k3_loss_fn",
    "sapo_loss_fn",
]

OUTSIDE = -100  # stands for tokens that no loss reads
NOT_OF_LOGPS = {"compiled", "use_ref_model", "chunk_size", "temperature"}


class LigerFusedLinearGRPOLoss(LossModule):
    """GRPO, BNPO, Dr. GRPO, DAPO, CISPO, SAPO, LUSPO and VESPO on hidden states."""

    @takes(GRPOOptions)
    def __init__(self) -> None: ...

    @classmethod
    def compute(
        cls,
        options: GRPOOptions,
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
        advantages: of sequences (B,) or (B, 1), or of tokens (B, T). vllm_is_ratio: as them, multiplies the loss
        before the KL.
        num_items_in_batch: tokens of all ranks, the divisor of dapo, cispo and vespo.
        Without old_per_token_logps the ratio is 1, with the gradient of the log-probability.
        """
        token_ids, mask, ref_logps = selected_token_ids, attention_mask, ref_per_token_logps
        check_sequences(_input, token_ids, lin_weight, bias)
        options.check_length()
        per_token = {
            "attention_mask": mask,
            "ref_per_token_logps": ref_logps,
            "old_per_token_logps": old_per_token_logps,
        }
        advantages = of_sequences_or_tokens("advantages", advantages, token_ids)
        if vllm_is_ratio is not None:
            vllm_is_ratio = of_sequences_or_tokens("vllm_is_ratio", vllm_is_ratio, token_ids)
        for name, values in per_token.items():
            if values is not None and values.shape != token_ids.shape:
                raise ValueError(
                    f"{name} has shape {tuple(values.shape)}, but the tokens {tuple(token_ids.shape)}."
                )
        group_size = token_ids.shape[1] if options.reads_sequences else 1
        count = None
        if options.loss_type != "luspo":  # which reads the tokens outside the mask as well
            token_ids = token_ids.masked_fill(mask == 0, OUTSIDE)
            count = count_labels(token_ids, OUTSIDE, group_size)
        if options.use_ref_model and options.beta != 0.0:
            reference = ref_input, ref_weight, ref_bias
            how = OUTSIDE, options.temperature, count
            ref_logps = reference_logps(ref_logps, reference, token_ids, *how)
        if num_items_in_batch is None and options.per_token_of_all_ranks:  # once, not per chunk
            num_items_in_batch = LigerFusedLinearPPOBase._tokens_of_all_ranks(mask)
        ref, old = (None if t is None else t.detach() for t in (ref_logps, old_per_token_logps))

        def of_logps(logps: Tensor) -> tuple[Tensor, list[Tensor]]:
            rest = ref, old, vllm_is_ratio, num_items_in_batch
            return policy_loss(options, logps, mask, advantages, mask, *rest)

        model = _input, lin_weight, token_ids, bias
        return loss_of_logps(
            of_logps,
            *(*model, OUTSIDE, options.temperature),
            group_size=group_size,
            label_count=count,
        )


class LigerFusedLinearGRPOFunction(
    LossFunction,
    LigerFusedLinearPPOBase,
    loss=LigerFusedLinearGRPOLoss,
    first="_input lin_weight selected_token_ids attention_mask advantages",
    last="compiled use_ref_model chunk_size vllm_is_ratio delta use_bias_correction_kl "
    "vespo_k_pos vespo_lambda_pos vespo_k_neg vespo_lambda_neg num_items_in_batch",
):
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
        """The loss from log-probabilities (b, T); `options` are those of the module that a loss of them can read."""
        if unread := NOT_OF_LOGPS & options.keys():
            raise TypeError(f"ppo_loss_fn does not take {', '.join(sorted(unread))}.")
        return policy_loss(
            GRPOOptions(**options),
            per_token_logps,
            attention_mask,
            advantages,
            full_attention_mask,
            ref_per_token_logps,
            old_per_token_logps,
            vllm_is_ratio,
            num_items_in_batch,
        )
