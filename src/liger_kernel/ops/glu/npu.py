"""The gated product by `torch_npu.npu_swiglu` and `npu_geglu`.

Documented in op-plugin: `npu_swiglu(input, dim=-1)` takes gate and up side by side in one contiguous tensor that is not
empty, and its derivative is `npu_swiglu_backward(grad_output, input, dim=-1)`. `npu_geglu(self, dim=-1, approximate=1,
activate_left=False) -> (y, gelu)` takes the same; 1 is the tanh approximation, and `activate_left` puts the gate first.
Its derivative is `npu_geglu_grad(grad_output, self, gelu, dim, approximate, activate_left)`.

A gate and an up of their own are put side by side first, as those who use these functions in models do.
"""

from __future__ import annotations

from typing import Any

import torch
import torch_npu
from torch import Tensor

from liger_kernel._core.contract import Grads, Needs, Saved
from liger_kernel._core.shapes import as_rows
from liger_kernel.backends.npu import no_native_call
from liger_kernel.ops.glu.contract import GLUOptions

_SILU = ("silu", "silu_step")  # without a limit the same


def unserved(gate: Tensor, up: Tensor | None, *, options: GLUOptions) -> str | None:
    if options != GLUOptions(options.activation) or options.activation == "silu_oai":
        return "a multiplier, a limit, alpha, or a form that torch_npu has not"
    return no_native_call(gate)


def _packed(gate: Tensor, up: Tensor | None) -> Tensor:
    return gate.contiguous() if up is None else torch.cat((gate, up), -1)


def _geglu(options: GLUOptions) -> dict[str, Any]:
    return {"dim": -1, "approximate": int(options.activation == "gelu_tanh"), "activate_left": True}


def forward(
    gate: Tensor, up: Tensor | None, *, options: GLUOptions, needs: Needs
) -> tuple[Tensor, Saved]:
    return _product(_packed(gate, up), options)[0], (gate, up)


def _product(packed: Tensor, options: GLUOptions) -> tuple[Tensor, Any]:
    """The product and, which GEGLU's backward needs, f(gate)."""
    if options.activation in _SILU:
        return torch_npu.npu_swiglu(packed, dim=-1), None
    return torch_npu.npu_geglu(packed, **_geglu(options))


def backward(grads: Any, saved: Any, *, options: GLUOptions, needs: Needs) -> Grads:
    dy = grads[0]
    found = _gradients(as_rows(dy), saved, options, needs)[0]
    return tuple(None if g is None else g.view(*dy.shape[:-1], -1) for g in found)


def backward_with_output(
    dy: Tensor, saved: Any, *, options: GLUOptions, needs: Needs, into: Grads | None = None
) -> tuple[Grads, Tensor]:
    """The native functions make their own outputs: neither `into` nor dy is written to."""
    return _gradients(dy, saved, options, needs, with_output=True)


def _gradients(
    dy: Tensor, saved: Any, options: GLUOptions, needs: Needs, with_output: bool = False
) -> tuple[Grads, Any]:
    """The gradients of rows, and the product."""
    gate, up = saved
    packed = _packed(as_rows(gate), None if up is None else as_rows(up))
    silu = options.activation in _SILU
    y, gelu = _product(packed, options) if with_output or not silu else (None, None)
    if silu:
        grad = torch_npu.npu_swiglu_backward(dy.contiguous(), packed, dim=-1)
    else:
        grad = torch_npu.npu_geglu_grad(dy.contiguous(), packed, gelu, **_geglu(options))
    if up is None:
        return (grad, None), y
    halves = grad.chunk(2, -1)
    return tuple(half if need else None for half, need in zip(halves, needs, strict=True)), y
