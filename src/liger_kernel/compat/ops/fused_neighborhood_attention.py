"""Neighbourhood attention as an autograd Function, and without one."""

from __future__ import annotations

import torch

import liger_kernel.ops.fused_neighborhood_attention as _attention
from liger_kernel.compat.function import autograd_function


def _neighborhood_attention(query, key, value, kernel_size=7, dilation=1, scale=None):
    return _attention.fused_neighborhood_attention(query, key, value, kernel_size, dilation, scale)


LigerFusedNeighborhoodAttentionFunction = autograd_function(
    "LigerFusedNeighborhoodAttentionFunction", _neighborhood_attention
)


@torch.no_grad()
def fused_neighborhood_attention_forward(
    query, key, value, kernel_size=7, dilation=1, scale=None, return_lse=False
):
    """(output, None, None): the weights of all pairs of tokens are never made."""
    if return_lse:
        raise NotImplementedError("return_lse=True: the log-sum-exp is not computed; pass False.")
    return _neighborhood_attention(query, key, value, kernel_size, dilation, scale), None, None
