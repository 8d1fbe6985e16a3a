"""Rotary position embedding (Su et al. 2021, https://arxiv.org/abs/2104.09864), rotating halves or neighbours."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from liger_kernel._core.autograd import Op
from liger_kernel._core.checks import check_choice, check_floating, check_same_device
from liger_kernel._core.dtensor import is_dtensor, on_shards
from liger_kernel._core.lazy import compat_names
from liger_kernel.backends.dispatch import Dispatch
from liger_kernel.ops import OPS
from liger_kernel.ops.rope import reference
from liger_kernel.ops.rope.contract import RopeOptions


class _RoPE(Op):
    pass


def _on_head_shards(
    run: Any, q: Tensor, k: Tensor | None, cos: Tensor, sin: Tensor
) -> tuple[Tensor | None, ...]:
    """Each rank rotates the heads that it holds."""
    cos, sin = (t.full_tensor() if is_dtensor(t) else t for t in (cos, sin))  # type: ignore[attr-defined]
    shapes = [q.shape, None if k is None else k.shape]
    return on_shards(lambda q, k: run(q, k, cos, sin), q, k, whole_dims=(0, 3), shapes=shapes)


_dispatch = Dispatch("rope", _RoPE, reference.rope, shards=_on_head_shards)


def rope(
    q: Tensor,
    k: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    unsqueeze_dim: int = 1,
    rotary_dim: int | None = None,
    interleaved: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Rotate the first `rotary_dim` columns of every head of q and k by the angles of their position.

    Each pair (a, b) becomes (a cos - b sin, b cos + a sin); both of its columns use one angle.

    Args:
        q, k: (B, H, S, D) for unsqueeze_dim 1, (B, S, H, D) for 2; any strides, each its own number of heads. k may
            be None.
        cos, sin: (S, R), (1 or B, S, R), or 4-D with a head axis of size 1; constants, they get no gradient. R is the
            rotary dimension, or half of it. Of a full-width table one half is read: columns 0..R/2-1, or the even
            columns where interleaved (the layout of `repeat_interleave`).
        unsqueeze_dim: where the heads are.
        rotary_dim: even; default min(R, D). The columns after it pass through.
        interleaved: pairs are columns (2i, 2i + 1) instead of (i, i + rotary_dim / 2).

    Returns: (q', k'), each in the dtype of its input, and by the kernel in its memory layout; computed in fp32 and
        rounded once. Never in place.
    Raises: ValueError for shapes that do not fit; TypeError for integer tensors.
    """
    check_choice("unsqueeze_dim", unsqueeze_dim, (1, 2))
    check_floating(q=q, k=k, cos=cos, sin=sin)
    check_same_device(q=q, k=k, cos=cos, sin=sin)
    _check_heads(q, k, unsqueeze_dim)
    cos, sin = _angles(q, cos, sin, unsqueeze_dim)
    width, head_dim = cos.shape[-1], q.shape[-1]
    if rotary_dim is None:
        rotary_dim = min(width, head_dim)
    if rotary_dim % 2 or not 0 < rotary_dim <= head_dim:
        raise ValueError(
            f"rotary_dim={rotary_dim} must be even and in 2..{head_dim}, the head dimension of q; "
            f"cos has {width} columns."
        )
    if width < rotary_dim // 2:
        raise ValueError(
            f"cos has {width} columns, but rotary_dim={rotary_dim} needs {rotary_dim // 2} or {rotary_dim} of them."
        )
    return _dispatch(RopeOptions(unsqueeze_dim, rotary_dim, interleaved), q, k, cos, sin)


def _check_heads(q: Tensor, k: Tensor | None, unsqueeze_dim: int) -> None:
    layout = "(B, H, S, D)" if unsqueeze_dim == 1 else "(B, S, H, D)"
    if q.ndim != 4 or (k is not None and k.ndim != 4):
        shapes = [tuple(t.shape) for t in (q, k) if t is not None]
        raise ValueError(
            f"q and k must be {layout} for unsqueeze_dim={unsqueeze_dim}, got {shapes}."
        )
    for dim in (0, 3 - unsqueeze_dim, 3):
        if k is not None and q.shape[dim] != k.shape[dim]:
            raise ValueError(
                f"q {tuple(q.shape)} and k {tuple(k.shape)} differ in dimension {dim}, but as {layout} they may differ "
                f"in the number of heads alone; set unsqueeze_dim to the dimension of the heads."
            )


def _angles(q: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int) -> tuple[Tensor, Tensor]:
    """Both as (1 or B, S, R) with the same strides, the last one 1."""
    batch, seq = q.shape[0], q.shape[3 - unsqueeze_dim]
    shape = tuple(cos.shape)
    if cos.ndim == 4 and 1 in shape[1:3]:
        heads = unsqueeze_dim if shape[unsqueeze_dim] == 1 else 3 - unsqueeze_dim
        cos, sin = cos.squeeze(heads), sin.squeeze(heads) if sin.shape == cos.shape else sin
    elif cos.ndim == 2:
        cos, sin = cos.unsqueeze(0), sin.unsqueeze(0)
    fits = cos.ndim == 3 and cos.shape[0] in (1, batch) and cos.shape[1] == seq
    if not fits or cos.shape != sin.shape:
        raise ValueError(
            f"cos {shape} and sin {tuple(sin.shape)} do not fit q {tuple(q.shape)} with unsqueeze_dim={unsqueeze_dim}: "
            f"both must be ({seq}, R), (1, {seq}, R) or ({batch}, {seq}, R), or that with an axis of size 1 for heads."
        )
    if cos.requires_grad or sin.requires_grad:
        cos, sin = cos.detach(), sin.detach()
    if cos.stride(2) != 1 or cos.stride() != sin.stride():
        cos, sin = cos.contiguous(), sin.contiguous()
    return cos, sin


__getattr__ = compat_names(__name__, OPS["rope"])
