"""The rotary embedding by `torch_npu.npu_rotary_mul`.

Documented in op-plugin as `npu_rotary_mul(input, r1, r2, rotary_mode="half") -> input * r1 + rotate(input) * r2`, with
the limits that `unserved` names; r1 and r2 are as wide as a head. It rounds them to the dtype of input, so that input
is widened where they are wider, as under autocast. That they lie in [-1, 1], as the page also says, cannot be asked
without waiting for the device: YaRN and LongRoPE scale them beyond.

A rotation by the opposite angles is the backward, so that q and k are not kept.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch_npu
from torch import Tensor

from liger_kernel._core.contract import Grads, Needs, Saved
from liger_kernel.backends.npu import no_native_call
from liger_kernel.ops.rope.contract import RopeOptions


def unserved(
    q: Tensor, k: Tensor | None, cos: Tensor, sin: Tensor, *, options: RopeOptions
) -> str | None:
    heads, batch, head_dim = options.unsqueeze_dim, q.shape[0], q.shape[-1]
    most_heads = max(q.shape[heads], 0 if k is None else k.shape[heads])
    if options.mrope_section is not None:
        return "the angles are selected by section"
    if options.rotary_dim != head_dim:
        return "the columns after rotary_dim pass through"
    if torch.float64 in (cos.dtype, sin.dtype):
        return "the angles are float64"
    if head_dim >= 896 or batch >= 1000 or most_heads >= 1000:
        return "heads of 896 columns, or 1000 of them, are too many"
    if options.interleaved and (cos.shape[0] != 1 or batch * most_heads >= 1000):
        return "interleaved, the angles are the same for every sequence, of fewer than 1000 heads"
    return no_native_call(q, k)


def _rotated(
    x: Tensor | None, angles: tuple[Tensor, Tensor], options: RopeOptions
) -> Tensor | None:
    if x is None:
        return None
    dtype = functools.reduce(torch.promote_types, (t.dtype for t in angles), x.dtype)
    wide = (t.to(dtype) for t in (x, *angles))
    mode = "interleave" if options.interleaved else "half"
    rotated: Tensor = torch_npu.npu_rotary_mul(*wide, rotary_mode=mode)
    return rotated.to(x.dtype)


def _tables(cos: Tensor, sin: Tensor, options: RopeOptions) -> tuple[Tensor, Tensor]:
    """One angle for both columns of a pair, as wide as a head, with an axis for the heads."""
    half = options.rotary_dim // 2
    step = 2 if options.interleaved and cos.shape[-1] >= options.rotary_dim else 1

    def table(angles: Tensor) -> Tensor:
        one = angles[..., : half * step : step]
        both = one.repeat_interleave(2, -1) if options.interleaved else torch.cat((one, one), -1)
        return both.unsqueeze(options.unsqueeze_dim)

    return table(cos), table(sin)


def forward(
    q: Tensor, k: Tensor | None, cos: Tensor, sin: Tensor, *, options: RopeOptions, needs: Needs
) -> tuple[Grads, Saved]:
    angles = _tables(cos, sin, options)
    return (_rotated(q, angles, options), _rotated(k, angles, options)), (cos, sin)


def backward(grads: Any, saved: Any, *, options: RopeOptions, needs: Needs) -> Grads:
    cos, sin = saved
    angles = _tables(cos, -sin, options)
    dq, dk = (g if need else None for g, need in zip(grads, needs[:2], strict=True))
    return _rotated(dq, angles, options), _rotated(dk, angles, options), None, None
