"""Rotary position embedding (Su et al. 2021, https://arxiv.org/abs/2104.09864), rotating halves or neighbours, by one
position or by those of time, height and width (Qwen2-VL, https://arxiv.org/abs/2409.12191)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
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
    mrope_section: Sequence[int] | None = None,
    mrope_interleaved: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Rotate the first `rotary_dim` columns of every head of q and k by the angles of their position.

    Each pair (a, b) becomes (a cos - b sin, b cos + a sin); both of its columns use one angle.

    Args:
        q, k: (B, H, S, D) for unsqueeze_dim 1, (B, S, H, D) for 2; any strides, each its own number of heads. k may
            be None.
        cos, sin: (S, R), (1 or B, S, R), or 4-D with a head axis of size 1; constants, they get no gradient. R is the
            rotary dimension, or half of it. Of a full-width table one half is read: columns 0..R/2-1, or the even
            columns where interleaved (the layout of `repeat_interleave`). With an `mrope_section` (3, 1 or B, S, R): a
            table each for the positions in time, height and width.
        unsqueeze_dim: where the heads are.
        rotary_dim: even; default min(R, D). The columns after it pass through.
        interleaved: pairs are columns (2i, 2i + 1) instead of (i, i + rotary_dim / 2).
        mrope_section: (t, h, w), which add up to rotary_dim / 2: so many pairs turn by time, height and width, in this
            order, or in turns (t h w t h w ...) if `mrope_interleaved`, as in Qwen3-VL.

    Returns: (q', k'), each in the dtype of its input, and by the kernel in its memory layout; computed in fp32 and
        rounded once. Never in place.
    Raises: ValueError for shapes that do not fit; TypeError for integer tensors.
    """
    sections = mrope_section is not None
    cos, sin, rotary_dim = check_rotation(q, k, cos, sin, unsqueeze_dim, rotary_dim, sections)
    if mrope_section is not None:
        mrope_section = tuple(mrope_section)
        if len(mrope_section) != 3 or sum(mrope_section) != rotary_dim // 2:
            raise ValueError(
                f"mrope_section={mrope_section} must be three numbers of pairs that add up to {rotary_dim // 2}, half "
                f"of rotary_dim={rotary_dim}."
            )
    options = RopeOptions(unsqueeze_dim, rotary_dim, interleaved, mrope_section, mrope_interleaved)
    return _dispatch(options, q, k, cos, sin)


def complex_rope(
    q: Tensor, k: Tensor | None, freqs_cis: Tensor, unsqueeze_dim: int = 2
) -> tuple[Tensor, Tensor | None]:
    """Multiply the columns (2i, 2i + 1) of every head of q and k, as complex numbers, by those of their position.

    Args:
        q, k, unsqueeze_dim: as in `rope`.
        freqs_cis: complex, (S, R/2) or (1 or B, S, R/2); columns from R on pass through.

    Returns, Raises: as `rope`, whose interleaved angles are the real and the imaginary part of `freqs_cis`.
    """
    if not freqs_cis.is_complex():
        raise TypeError(
            f"freqs_cis must be complex, got {freqs_cis.dtype}; call rope with cosines and sines."
        )
    pairs = torch.view_as_real(freqs_cis.detach().resolve_conj().contiguous())
    cos, sin = pairs[..., 0], pairs[..., 1]
    return rope(q, k, cos, sin, unsqueeze_dim, 2 * cos.shape[-1], interleaved=True)


def check_rotation(
    q: Tensor,
    k: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    unsqueeze_dim: int,
    rotary_dim: int | None,
    sections: bool = False,
) -> tuple[Tensor, Tensor, int]:
    """cos and sin as a kernel takes them, and the rotary dimension. Raises what `rope` raises."""
    check_choice("unsqueeze_dim", unsqueeze_dim, (1, 2))
    check_floating(q=q, k=k, cos=cos, sin=sin)
    check_same_device(q=q, k=k, cos=cos, sin=sin)
    _check_heads(q, k, unsqueeze_dim)
    cos, sin = _angles(q, cos, sin, unsqueeze_dim, sections)
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
    return cos, sin, rotary_dim


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


def _angles(
    q: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int, sections: bool
) -> tuple[Tensor, Tensor]:
    """Both as (1 or B, S, R), or (3, 1 or B, S, R), with the same strides, the last one 1 or 2."""
    batch, seq = q.shape[0], q.shape[3 - unsqueeze_dim]
    shape, tables = tuple(cos.shape), cos.shape[:1] if sections else ()
    if sections:
        pass
    elif cos.ndim == 4 and 1 in shape[1:3]:
        heads = unsqueeze_dim if shape[unsqueeze_dim] == 1 else 3 - unsqueeze_dim
        cos, sin = cos.squeeze(heads), sin.squeeze(heads) if sin.shape == cos.shape else sin
    elif cos.ndim == 2:
        cos, sin = cos.unsqueeze(0), sin.unsqueeze(0)
    of_batch = cos.shape[1:] if sections else cos.shape
    fits = len(of_batch) == 3 and of_batch[0] in (1, batch) and of_batch[1] == seq
    if not fits or tables not in ((), (3,)) or cos.shape != sin.shape:
        axes = "3, " if sections else ""
        wanted = f"({axes}1, {seq}, R) or ({axes}{batch}, {seq}, R)"
        if not sections:
            wanted = f"({seq}, R), {wanted}, or that with an axis of size 1 for heads"
        raise ValueError(
            f"cos {shape} and sin {tuple(sin.shape)} do not fit q {tuple(q.shape)} with unsqueeze_dim={unsqueeze_dim}: "
            f"both must be {wanted}."
        )
    if cos.requires_grad or sin.requires_grad:
        cos, sin = cos.detach(), sin.detach()
    if cos.stride(-1) not in (1, 2) or cos.stride() != sin.stride():
        cos, sin = cos.contiguous(), sin.contiguous()
    return cos, sin


__getattr__ = compat_names(__name__, OPS["rope"])
