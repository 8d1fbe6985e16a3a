"""Rotary position embedding in plain PyTorch: the specification."""

import torch
from torch import Tensor


def rope(
    q: Tensor,
    k: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    unsqueeze_dim: int,
    rotary_dim: int | None,
    interleaved: bool,
    mrope_section: tuple[int, ...] | None = None,
    mrope_interleaved: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Rotates each pair (a, b) of the first R = `rotary_dim` columns to (a cos - b sin, b cos + a sin); (q', k').

    Pair i is columns (i, i + R/2), or (2i, 2i + 1) if interleaved. Its angle is column i of cos and sin, or column 2i
    where they are interleaved and at least R wide; with an `mrope_section`, of the table that it selects. Computed in
    fp32 (float64 for float64), rounded once.
    """
    if rotary_dim is None:
        rotary_dim = min(cos.shape[-1], q.shape[-1])
    half = rotary_dim // 2
    step = 2 if interleaved and cos.shape[-1] >= rotary_dim else 1
    cos, sin = (t[..., : half * step : step] for t in (cos, sin))
    if mrope_section is not None:
        cos, sin = (_selected(t, mrope_section, mrope_interleaved) for t in (cos, sin))
    cos, sin = (_at_heads(t, unsqueeze_dim) for t in (cos, sin))

    def rotated(x: Tensor) -> Tensor:
        compute = torch.promote_types(x.dtype, torch.float32)
        c, s, values = cos.to(compute), sin.to(compute), x[..., :rotary_dim].to(compute)
        if interleaved:
            a, b = values[..., 0::2], values[..., 1::2]
            turned = torch.stack((a * c - b * s, b * c + a * s), -1).flatten(-2)
        else:
            a, b = values[..., :half], values[..., half:]
            turned = torch.cat((a * c - b * s, b * c + a * s), -1)
        return torch.cat((turned.to(x.dtype), x[..., rotary_dim:]), -1)

    return rotated(q), None if k is None else rotated(k)


def _at_heads(angles: Tensor, unsqueeze_dim: int) -> Tensor:
    """(S, R), (B, S, R) or 4-D with one axis of size 1 for the heads -> 4-D, that axis at `unsqueeze_dim`."""
    if angles.ndim == 4:
        angles = angles.squeeze(
            unsqueeze_dim if angles.shape[unsqueeze_dim] == 1 else 3 - unsqueeze_dim
        )
    if angles.ndim == 2:
        angles = angles.unsqueeze(0)
    return angles.unsqueeze(unsqueeze_dim)


def _selected(angles: Tensor, section: tuple[int, ...], interleaved: bool) -> Tensor:
    """(3, B, S, R/2) -> (B, S, R/2): the table of time, height or width for each column."""
    time, height, width = section
    column = torch.arange(angles.shape[-1], device=angles.device)
    if interleaved:  # t h w t h w ..., then t where height or width have no more
        axis = column % 3
        more = column < 3 * torch.where(axis == 1, height, width)
        table = torch.where(more, axis, 0)
    else:
        table = (column >= time).long() + (column >= time + height).long()
    return angles.gather(0, table.expand(1, *angles.shape[1:]))[0]
