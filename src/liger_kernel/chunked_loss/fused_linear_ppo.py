"""The base of policy losses that other projects write, and what ours share with it."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from liger_kernel._core.shapes import cdiv
from liger_kernel.chunked_loss.engine import (
    LossOfLogps,
    check_sequences,
    loss_of_logps,
    of_sequences_or_tokens,
    reference_token_logps,
    token_logps,
)
from liger_kernel.chunked_loss.gradients import GradientsInForward
from liger_kernel.chunked_loss.options import check_chunk_size

#: what `ppo_loss_fn` gets of the options of its base, as they are
READ_BY_LOSSES = (
    *("epsilon_low", "epsilon_high", "beta", "loss_type", "max_completion_length"),
    *("importance_sampling_level", "sapo_temperature_pos", "sapo_temperature_neg", "delta"),
    *("use_bias_correction_kl", "vespo_k_pos", "vespo_lambda_pos", "vespo_k_neg"),
    *("vespo_lambda_neg", "num_items_in_batch"),
)


class LigerFusedLinearPPOBase(GradientsInForward):
    """`ppo_loss_fn` of the log-probabilities of sampled tokens, added up over the batch.

    A subclass gives `ppo_loss_fn(per_token_logps, attention_mask, advantages, full_attention_mask,
    ref_per_token_logps=, old_per_token_logps=, ...)`: the sum over the sequences that it is given, divided by what it
    counts in the mask of all of them; and a list of metrics, 0-d ones, which are added up, or such of sequences.
    A subclass whose forward saves the gradients of hidden states, weight and bias itself has its backward here.
    """

    @staticmethod
    def ppo_loss_fn(
        per_token_logps: Tensor,
        attention_mask: Tensor,
        advantages: Tensor,
        full_attention_mask: Tensor,
        **options: Any,
    ) -> Any:
        raise NotImplementedError("A policy loss defines ppo_loss_fn.")

    @staticmethod
    def forward(
        cls: Any,
        ctx: Any,
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
        epsilon_low: float = 0.2,
        epsilon_high: float = 0.2,
        beta: float = 0.04,
        loss_type: str = "dapo",
        max_completion_length: int | None = None,
        importance_sampling_level: str = "token",
        temperature: float = 1.0,
        compiled: bool = True,
        use_ref_model: bool = False,
        chunk_size: int = 1,
        sapo_temperature_pos: float = 1.0,
        sapo_temperature_neg: float = 1.05,
        vllm_is_ratio: Tensor | None = None,
        delta: float | None = None,
        use_bias_correction_kl: bool = False,
        vespo_k_pos: float = 2.0,
        vespo_lambda_pos: float = 3.0,
        vespo_k_neg: float = 3.0,
        vespo_lambda_neg: float = 2.0,
        num_items_in_batch: Tensor | float | None = None,
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The loss, and its metrics. `ppo_loss_fn` gets `chunk_size` sequences at a time, and all options but those of
        the reference model, `temperature`, which divides the logits, and `compiled`, which has no effect.

        _input: (B, T, H). weight: (V, H). selected_token_ids: (B, T), all of them classes, also outside the mask, where
        `ppo_loss_fn` decides what counts. attention_mask, ref_per_token_logps, old_per_token_logps: (B, T).
        advantages, vllm_is_ratio: (B,), or (B, 1) or (B, T).
        """
        of_names = locals()
        check_chunk_size(chunk_size)
        if loss_type == "dr_grpo" and max_completion_length is None:
            raise ValueError(
                "max_completion_length must be provided for loss_type 'dr_grpo', got None."
            )
        if use_ref_model:
            reference, ids = (ref_input, ref_weight, ref_bias), selected_token_ids
            ref_per_token_logps = reference_logps(
                ref_per_token_logps, reference, ids, temperature=temperature
            )
        loss_fn = partial(cls.ppo_loss_fn, **{name: of_names[name] for name in READ_BY_LOSSES})
        batch = attention_mask.shape[0]
        size = cdiv(max(batch, 1), max(1, batch // chunk_size))
        per_token = ref_per_token_logps, old_per_token_logps, vllm_is_ratio
        of_logps = _of_chunks(loss_fn, size, attention_mask, advantages, *per_token)

        def loss_of(
            hidden: Tensor, weight: Tensor, bias: Tensor | None
        ) -> tuple[Tensor, tuple[Tensor, ...]]:
            check_sequences(hidden, selected_token_ids, weight, bias)
            model = hidden, weight, selected_token_ids, bias
            # sequences that do not part evenly are one group
            sequences = batch if batch % size else size
            length = selected_token_ids.shape[1]
            return loss_of_logps(
                of_logps, *model, temperature=temperature, group_size=sequences * length
            )

        return GradientsInForward.keep(ctx, loss_of, _input, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor, *grad_metrics: Any) -> tuple[Tensor | None, ...]:
        """Gradients of the hidden states and the weight, three times None, and that of the bias."""
        dx, dw, db = GradientsInForward.handed_out(ctx, grad_output)
        return dx, dw, None, None, None, db

    @staticmethod
    def chunk_forward(
        input_chunk: Tensor,
        weight: Tensor,
        selected_token_ids: Tensor,
        bias: Tensor | None = None,
        temperature: float = 1.0,
    ) -> Tensor:
        """(B, T) log-probabilities, at least fp32, of the tokens (B, T) under hidden states (B, T, H)."""
        return token_logps(input_chunk, weight, selected_token_ids, bias, temperature=temperature)

    @staticmethod
    def _compute_dapo_normalizer(
        attention_mask: Tensor, num_items_in_batch: Tensor | float | None = None
    ) -> Tensor:
        """Tokens per rank, at least 1: `num_items_in_batch` counts those of all ranks, else the masks are added up."""
        if num_items_in_batch is None:
            total = LigerFusedLinearPPOBase._tokens_of_all_ranks(attention_mask)
        else:
            total = torch.as_tensor(
                num_items_in_batch, dtype=torch.float32, device=attention_mask.device
            )
        world = torch.distributed.get_world_size() if _distributed() else 1
        return (total / world).clamp(min=1.0)

    @staticmethod
    def _tokens_of_all_ranks(attention_mask: Tensor) -> Tensor:
        total = attention_mask.sum(dtype=torch.float32)
        if _distributed():
            torch.distributed.all_reduce(total, op=torch.distributed.ReduceOp.SUM)
        return total


def _distributed() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def reference_logps(
    given: Tensor | None,
    reference: tuple[Tensor | None, Tensor | None, Tensor | None],
    ids: Tensor,
    *how: Any,
    **more: Any,
) -> Tensor:
    """The log-probabilities of a reference model that were `given`; else `reference_token_logps` of its tensors."""
    hidden, weight, bias = reference
    if given is not None:
        if hidden is not None:
            warnings.warn(
                "Both ref_per_token_logps and ref_input are given; ref_per_token_logps is used.",
                stacklevel=4,
            )
        return given
    if hidden is None or weight is None:
        raise ValueError(
            "use_ref_model=True, but there is neither ref_per_token_logps nor ref_input with ref_weight; pass one of "
            "them, or use_ref_model=False."
        )
    return reference_token_logps((hidden, weight, bias), ids, *how, **more)


def _of_chunks(
    loss_fn: Callable[..., tuple[Tensor, Sequence[Tensor]]],
    size: int,
    mask: Tensor,
    advantages: Tensor,
    ref_logps: Tensor | None,
    old_logps: Tensor | None,
    vllm_is_ratio: Tensor | None,
) -> LossOfLogps:
    """`loss_fn` of so many sequences at a time, added up; its metrics added up, or put together."""

    def wide(t: Tensor | None) -> Tensor | None:
        return None if t is None else t.detach().to(torch.promote_types(t.dtype, torch.float32))

    if vllm_is_ratio is not None:
        vllm_is_ratio = of_sequences_or_tokens("vllm_is_ratio", vllm_is_ratio, mask)
    per_token = {
        "ref_per_token_logps": wide(ref_logps),
        "old_per_token_logps": wide(old_logps),
        "vllm_is_ratio": vllm_is_ratio,
    }

    def of_chunk(logps: Tensor, at: slice) -> tuple[Tensor, Sequence[Tensor]]:
        rows = {name: None if t is None else t[at] for name, t in per_token.items()}
        return loss_fn(logps[at], mask[at], advantages[at], mask, **rows)

    def of_logps(logps: Tensor) -> tuple[Tensor, list[Tensor]]:
        starts = range(0, max(mask.shape[0], 1), size)
        losses, metrics = zip(*(of_chunk(logps, slice(i, i + size)) for i in starts), strict=True)
        values = zip(*metrics, strict=True)
        together = [torch.stack(m).sum() if m[0].ndim == 0 else torch.cat(m) for m in values]
        return torch.stack(losses).sum(dtype=logps.dtype), together

    return of_logps
