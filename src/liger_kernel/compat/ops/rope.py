"""The incumbent's rotary functions: of halves, of complex numbers (Llama 4), by three positions (Qwen2-VL)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

import liger_kernel.ops.rope as _rope
from liger_kernel.compat.function import autograd_function

#: name -> what its `apply` computes
FUNCTIONS: dict[str, Callable[..., Any]] = {
    "LigerRopeFunction": lambda q, k, cos, sin, position_ids=None, unsqueeze_dim=1, rotary_dim=None: (
        _rope.rope(q, k, cos, sin, unsqueeze_dim, rotary_dim)
    ),
    "LigerLlama4RopeFunction": lambda q, k, freqs_cis, BLOCK_SIZE=None: _complex_rope(
        q, k, freqs_cis
    ),
    "LigerQwen2VLMRopeFunction": lambda q, k, cos, sin, mrope_section, unsqueeze_dim=1: _rope.rope(
        q, k, cos, sin, unsqueeze_dim, mrope_section=mrope_section
    ),
}
globals().update({name: autograd_function(name, call) for name, call in FUNCTIONS.items()})


def _complex_rope(q, k, freqs_cis, imag_sign=1.0):
    """`freqs_cis` complex, or real with an axis of 2 for both parts; of more rows than tokens the first ones."""
    freqs = freqs_cis if freqs_cis.is_complex() else torch.view_as_complex(freqs_cis.contiguous())
    if freqs.ndim == 2:
        freqs = freqs[: q.shape[1]]
    if imag_sign != 1:
        freqs = torch.complex(freqs.real, freqs.imag * imag_sign)
    return _rope.complex_rope(q, k, freqs)


@torch.no_grad()
def rope_forward(q, k, cos, sin, position_ids=None, unsqueeze_dim=1, rotary_dim=None):
    """(q', k', cos, sin)."""
    return *_rope.rope(q, k, cos, sin, unsqueeze_dim, rotary_dim), cos, sin


@torch.no_grad()
def rope_backward(dq, dk, cos, sin, position_ids=None, unsqueeze_dim=1, rotary_dim=None):
    """(dq', dk'), the inverse rotation of the gradients."""
    return _rope.rope(dq, dk, cos, -sin, unsqueeze_dim, rotary_dim)


@torch.no_grad()
def llama4_rope_forward(q, k, freqs_cis, BLOCK_SIZE=None, imag_sign=1.0):
    """(q', k'); an `imag_sign` of -1.0 turns gradients back."""
    return _complex_rope(q, k, freqs_cis, imag_sign)


@torch.no_grad()
def qwen2vl_mrope_forward(q, k, cos, sin, mrope_section):
    """(q', k', cos, sin)."""
    return *_rope.rope(q, k, cos, sin, mrope_section=mrope_section), cos, sin


@torch.no_grad()
def qwen2vl_mrope_backward(dq, dk, cos, sin, mrope_section):
    """(dq', dk'), the inverse rotation of the gradients."""
    return _rope.rope(dq, dk, cos, -sin, mrope_section=mrope_section)
