"""A mixture of experts that are spread over ranks, as a module."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from liger_kernel.distributed.expert_parallel import expert_parallel_moe


class LigerExpertParallelFusedMoe(nn.Module):
    """The SwiGLU experts of all ranks of a group, of which each has tokens of its own. It has no parameters."""

    def __init__(self, process_group: Any = None):
        super().__init__()
        self.process_group = process_group

    def forward(
        self,
        hidden_states: Tensor,
        expert_indices: Tensor,
        expert_weights: Tensor,
        all_B: Tensor,
        all_C: Tensor,
        all_A: Tensor,
        num_experts: int,
    ) -> Tensor:
        """Tokens (..., H), indices and weights (..., K), and the weights of the gate, of up and of down.

        See `liger_kernel.distributed.expert_parallel.expert_parallel_moe`.
        """
        top_k = expert_indices.shape[-1]
        out = expert_parallel_moe(
            hidden_states.reshape(-1, hidden_states.shape[-1]),
            all_B,
            all_C,
            all_A,
            expert_indices.reshape(-1, top_k),
            expert_weights.reshape(-1, top_k),
            num_experts,
            self.process_group,
        )
        return out.view(hidden_states.shape)
