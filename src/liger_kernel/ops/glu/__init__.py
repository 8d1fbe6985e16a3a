"""Gated activations: SwiGLU and GEGLU (Shazeer 2020, https://arxiv.org/abs/2002.05202) without their projections."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from liger_kernel._core.autograd import Op
from liger_kernel._core.checks import check_choice, check_floating, check_same_device
from liger_kernel._core.dtensor import on_shards
from liger_kernel._core.shapes import as_rows
from liger_kernel.backends import kernels_of
from liger_kernel.backends.dispatch import Dispatch
from liger_kernel.ops.glu import reference
from liger_kernel.ops.glu.contract import GLUOptions

ACTIVATIONS = tuple(reference.ACTIVATIONS)


class _GLU(Op):
    """Without `up`, `gate` is packed."""


def _by_torch(options: GLUOptions, gate: Tensor, up: Tensor | None) -> Tensor | None:
    """Two C++ ops cost less than one of ours."""
    if up is None or (options.gate_multiplier, options.down_multiplier) != (1.0, 1.0):
        return None
    return reference.glu(gate, up, **options.named())


def _on_shards(run: Callable[..., Tensor], gate: Tensor, up: Tensor | None) -> Any:
    if up is not None:
        return on_shards(run, gate, up)
    half = torch.Size((*gate.shape[:-1], gate.shape[-1] // 2))
    return on_shards(run, gate, up, whole_dims=(-1,), shapes=half)


_dispatch = Dispatch("glu", _GLU, reference.glu, shards=_on_shards, small=2**23, eager=_by_torch)


def glu(
    gate: Tensor,
    up: Tensor,
    activation: str = "silu",
    gate_multiplier: float = 1.0,
    down_multiplier: float = 1.0,
) -> Tensor:
    """Gated activation: `f(gate * gate_multiplier) * up * down_multiplier`.

    Args:
        gate, up: (..., F), one floating dtype, any strides. DTensors are computed shard by shard.
        activation: "silu", "gelu_tanh" (the tanh approximation) or "gelu" (exact, with erf).
        gate_multiplier, down_multiplier: scalars, as in Falcon-H1.

    Returns: (..., F) in the dtype of gate. f is rounded to it before the product with up, as in eager code; everything
        else is rounded once.
    Raises: ValueError for an unknown activation or for shapes, dtypes or devices that differ; TypeError for integers.
    """
    check_choice("activation", activation, ACTIVATIONS)
    check_floating(gate=gate, up=up)
    if gate.shape != up.shape or gate.dtype != up.dtype or gate.ndim == 0:
        raise ValueError(
            f"gate and up must have the same dtype and shape (..., F), got {gate.dtype} {tuple(gate.shape)} and "
            f"{up.dtype} {tuple(up.shape)}; expand or convert one of them."
        )
    check_same_device(gate=gate, up=up)
    options = GLUOptions(activation, float(gate_multiplier), float(down_multiplier))
    return _dispatch(options, gate, up)


def glu_packed(
    gate_up: Tensor,
    activation: str = "silu",
    gate_multiplier: float = 1.0,
    down_multiplier: float = 1.0,
) -> Tensor:
    """`glu` of the two halves of the last dimension, the gate first; its gradient is one tensor, written once.

    Args:
        gate_up: (..., 2F), the output of a fused projection; the rest as in `glu`.

    Returns: (..., F).
    Raises: ValueError for an odd last dimension or an unknown activation; TypeError for integers.
    """
    check_choice("activation", activation, ACTIVATIONS)
    check_floating(gate_up=gate_up)
    if gate_up.ndim == 0 or gate_up.shape[-1] % 2:
        raise ValueError(
            f"The last dimension of gate_up must be even, gate and up side by side; got shape {tuple(gate_up.shape)}."
        )
    options = GLUOptions(activation, float(gate_multiplier), float(down_multiplier))
    return _dispatch(options, gate_up, None)


def gated_product(
    gate: Tensor,
    up: Tensor | None,
    activation: str = "silu",
    gate_multiplier: float = 1.0,
    down_multiplier: float = 1.0,
) -> Tensor:
    """`glu`, or without `up` `glu_packed` of `gate`."""
    options = (activation, gate_multiplier, down_multiplier)
    return glu_packed(gate, *options) if up is None else glu(gate, up, *options)


class LigerSiLUMulFunction:
    """`apply` in the argument order of the incumbent."""

    @staticmethod
    def apply(
        a: Tensor, b: Tensor, gate_multiplier: float = 1.0, down_multiplier: float = 1.0
    ) -> Tensor:
        return glu(a, b, "silu", gate_multiplier, down_multiplier)


class LigerFusedGateUpSiLUMulFunction:
    """`apply` in the argument order of the incumbent; `in_place` is accepted and changes nothing."""

    @staticmethod
    def apply(y: Tensor, in_place: bool = False) -> Tensor:
        return glu_packed(y, "silu")


class LigerGELUMulFunction:
    """`apply` in the argument order of the incumbent: the tanh approximation."""

    @staticmethod
    def apply(a: Tensor, b: Tensor) -> Tensor:
        return glu(a, b, "gelu_tanh")


def swiglu_forward(
    a: Tensor, b: Tensor, gate_multiplier: float = 1.0
) -> tuple[Tensor, Tensor, Tensor]:
    """(a and b as (R, F) for `swiglu_backward`, silu(a * gate_multiplier) * b like a). No autograd."""
    return _forward(a, b, "silu", gate_multiplier)


def swiglu_backward(
    a: Tensor, b: Tensor, dc: Tensor, gate_multiplier: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Fresh gradients of a and b, shaped like dc; a and b as `swiglu_forward` returns them."""
    return _backward(a, b, dc, "silu", gate_multiplier)


def geglu_forward(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(a and b as (R, F) for `geglu_backward`, gelu_tanh(a) * b like a). No autograd."""
    return _forward(a, b, "gelu_tanh")


def geglu_backward(a: Tensor, b: Tensor, dc: Tensor) -> tuple[Tensor, Tensor]:
    """Fresh gradients of a and b, shaped like dc; a and b as `geglu_forward` returns them."""
    return _backward(a, b, dc, "gelu_tanh")


def swiglu_fused_gate_up_forward(y: Tensor) -> tuple[Tensor, Tensor]:
    """(y as (R, 2F) for the backward helper, SwiGLU of its halves (..., F)). No autograd."""
    with torch.no_grad():
        return as_rows(y), glu_packed(y)


def swiglu_fused_gate_up_backward(y: Tensor, dc: Tensor, in_place: bool = False) -> Tensor:
    """The gradient (R, 2F) of the packed rows, always a fresh tensor."""
    impl = kernels_of("glu", y)
    return impl.backward((as_rows(dc),), (y, None), options=GLUOptions(), needs=(True, False))[0]


def _forward(
    a: Tensor, b: Tensor, activation: str, gate_multiplier: float = 1.0
) -> tuple[Tensor, Tensor, Tensor]:
    with torch.no_grad():
        return as_rows(a), as_rows(b), glu(a, b, activation, gate_multiplier)


def _backward(
    a: Tensor, b: Tensor, dc: Tensor, activation: str, gate_multiplier: float = 1.0
) -> tuple[Tensor, Tensor]:
    options = GLUOptions(activation, gate_multiplier)
    impl = kernels_of("glu", a)
    da, db = impl.backward((as_rows(dc),), (a, b), options=options, needs=(True, True))
    return da.view(dc.shape), db.view(dc.shape)
