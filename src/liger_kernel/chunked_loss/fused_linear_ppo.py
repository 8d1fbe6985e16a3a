"""What policy losses need from hidden states and masks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from liger_kernel.chunked_loss.engine import token_logps
from liger_kernel.chunked_loss.gradients import GradientsInForward


class LigerFusedLinearPPOBase(GradientsInForward):
    """Log-probabilities of sampled tokens, and how many tokens a loss over all ranks is divided by.

    A subclass whose forward saves the gradients of hidden states, weight and bias has its backward here.
    """

    @staticmethod
    def forward(ctx: Any, *args: Any) -> Any:
        raise NotImplementedError(
            "A loss derived from LigerFusedLinearPPOBase defines its own forward; GRPO and its relatives are "
            "LigerFusedLinearGRPOLoss(loss_type=...)."
        )

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
