"""Gated activations: SwiGLU and GEGLU (Shazeer 2020, https://arxiv.org/abs/2002.05202) without their projections."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from liger_kernel._core.autograd import Op
from liger_kernel._core.checks import check_choice, check_floating, check_same_device
from liger_kernel._core.dtensor import on_shards
from liger_kernel._core.lazy import compat_names
from liger_kernel.backends.dispatch import Dispatch
from liger_kernel.ops import OPS
from liger_kernel.ops.glu import reference
from liger_kernel.ops.glu.contract import GLUOptions

ACTIVATIONS = tuple(reference.ACTIVATIONS)


class _GLU(Op):
    """Without `up`, `gate` is packed."""


def _by_torch(options: GLUOptions, gate: Tensor, up: Tensor | None) -> Tensor | None:
    """Two C++ ops cost less than one of ours."""
    if up is None or options != GLUOptions(options.activation):
        return None
    return reference.glu(gate, up, **options.named())


def _on_shards(run: Callable[..., Tensor], gate: Tensor, up: Tensor | None) -> Any:
    if up is not None:
        return on_shards(run, gate, up)
    half = torch.Size((*gate.shape[:-1], gate.shape[-1] // 2))
    return on_shards(run, gate, up, whole_dims=(-1,), shapes=half)


_dispatch = Dispatch("glu", _GLU, reference.glu, shards=_on_shards, small=2**23, eager=_by_torch)


def gate_options(
    activation: str,
    gate_multiplier: float,
    down_multiplier: float = 1.0,
    limit: float | None = None,
    alpha: float = 1.0,
    interleaved: bool = False,
) -> GLUOptions:
    """The options of a gated product, checked."""
    check_choice("activation", activation, ACTIVATIONS)
    if limit is not None and not limit > 0:
        raise ValueError(f"limit={limit} must be positive; pass None for no limit.")
    if alpha != 1 and activation.startswith("gelu"):
        raise ValueError(f"alpha={alpha} belongs to silu, but the activation is {activation!r}.")
    return GLUOptions(
        activation,
        float(gate_multiplier),
        float(down_multiplier),
        None if limit is None else float(limit),
        float(alpha),
        interleaved,
    )


def glu(
    gate: Tensor,
    up: Tensor,
    activation: str = "silu",
    gate_multiplier: float = 1.0,
    down_multiplier: float = 1.0,
    limit: float | None = None,
    alpha: float = 1.0,
) -> Tensor:
    """Gated activation: `f(gate * gate_multiplier) * up * down_multiplier`.

    Args:
        gate, up: (..., F), one floating dtype, any strides. DTensors are computed shard by shard.
        activation: "silu", "gelu_tanh" (the tanh approximation) or "gelu" (exact, with erf); "silu_oai", whose up is
            `up + 1`, as in gpt-oss; "silu_step", whose limit is that of f and not of the gate, as in Step-3.
        gate_multiplier, down_multiplier: scalars, as in Falcon-H1.
        limit: of the gate from above, and of up from both sides, as in DeepSeek-V4; None for none.
        alpha: silu is `x * sigmoid(alpha * x)`; 1.702 in gpt-oss.

    Returns: (..., F) in the dtype of gate. f is rounded to it before the product with up, as in eager code; everything
        else is rounded once. Gradients of what is beyond the limit are zero, as those of `torch.clamp`.
    Raises: ValueError for an unknown activation, a limit that is not positive, an alpha of gelu, or for shapes, dtypes
        or devices that differ; TypeError for integers.
    """
    options = gate_options(activation, gate_multiplier, down_multiplier, limit, alpha)
    check_floating(gate=gate, up=up)
    if gate.shape != up.shape or gate.dtype != up.dtype or gate.ndim == 0:
        raise ValueError(
            f"gate and up must have the same dtype and shape (..., F), got {gate.dtype} {tuple(gate.shape)} and "
            f"{up.dtype} {tuple(up.shape)}; expand or convert one of them."
        )
    check_same_device(gate=gate, up=up)
    return _dispatch(options, gate, up)


def glu_packed(
    gate_up: Tensor,
    activation: str = "silu",
    gate_multiplier: float = 1.0,
    down_multiplier: float = 1.0,
    limit: float | None = None,
    alpha: float = 1.0,
    interleaved: bool = False,
) -> Tensor:
    """`glu` of the two halves of the last dimension, the gate first; its gradient is one tensor, written once.

    Args:
        gate_up: (..., 2F), the output of a fused projection.
        interleaved: gate and up alternate, the gate first, as in gpt-oss. The rest as in `glu`.

    Returns: (..., F).
    Raises: ValueError for an odd last dimension, and as `glu`; TypeError for integers.
    """
    options = gate_options(activation, gate_multiplier, down_multiplier, limit, alpha, interleaved)
    check_floating(gate_up=gate_up)
    if gate_up.ndim == 0 or gate_up.shape[-1] % 2:
        raise ValueError(
            f"The last dimension of gate_up must be even, gate and up side by side; got shape {tuple(gate_up.shape)}."
        )
    return _dispatch(options, gate_up, None)


def gated_product(
    gate: Tensor,
    up: Tensor | None,
    activation: str = "silu",
    gate_multiplier: float = 1.0,
    down_multiplier: float = 1.0,
    limit: float | None = None,
    alpha: float = 1.0,
    interleaved: bool = False,
) -> Tensor:
    """`glu`, or without `up` `glu_packed` of `gate`, for which alone `interleaved` is."""
    options = (activation, gate_multiplier, down_multiplier, limit, alpha)
    return glu_packed(gate, *options, interleaved) if up is None else glu(gate, up, *options)


__getattr__ = compat_names(__name__, OPS["glu"])
