"""The incumbent's names for the mixture of experts."""

from __future__ import annotations

import torch
from torch import Tensor

from liger_kernel.compat.function import autograd_function
from liger_kernel.ops.fused_moe import fused_moe
from liger_kernel.ops.fused_moe.checks import check_index
from liger_kernel.ops.fused_moe.pipeline import sort_by_expert

BLOCK_M_TOKEN = 64


def _fused_moe(x, gate_up_proj, down_proj, top_k_index, top_k_weights):
    return fused_moe(x, gate_up_proj, down_proj, top_k_index, top_k_weights)


LigerFusedMoEFunction = autograd_function("LigerFusedMoEFunction", _fused_moe)


def compute_routing_metadata(
    topk_indices: Tensor, E: int, block_m_token: int = BLOCK_M_TOKEN
) -> tuple[Tensor, ...]:
    """Who goes where, of (T, K) indices: seven int32 tensors.

    Returns: rows of each expert (E,); first row of each, and the number of rows (E + 1,); of each row its token and its
        slot t K + k; of each slot its row; of each tile of at most `block_m_token` rows its first row and its expert.
        The number of tiles is read back from the device.
    """
    check_index(topk_indices, E)
    slots, rows, starts = sort_by_expert(topk_indices, E)
    counts = starts.diff()
    tiles = (counts + block_m_token - 1) // block_m_token
    expert = torch.repeat_interleave(torch.arange(E, device=starts.device), tiles)
    within = torch.arange(expert.numel(), device=starts.device) - (tiles.cumsum(0) - tiles)[expert]
    tokens = slots // max(1, topk_indices.shape[-1])
    found = (counts, starts, tokens, slots, rows, starts[expert] + within * block_m_token, expert)
    return tuple(t.to(torch.int32) for t in found)
