"""The gated feed-forward block (Shazeer 2020, https://arxiv.org/abs/2002.05202) with its three matrix products.

Its product `f(gate) * up`, as large as the gate, is not kept for backward: the kernel that makes the gradients of gate
and up makes it once more, over the memory of its own gradient.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from liger_kernel._core.autograd import Op
from liger_kernel._core.checks import check_choice, check_floating, check_same_device
from liger_kernel._core.dtensor import is_dtensor
from liger_kernel._core.launch import as_rows
from liger_kernel.backends import host_bound, implementation
from liger_kernel.ops.gated_mlp import reference
from liger_kernel.ops.glu import ACTIVATIONS, glu, glu_packed

#: elements of the gate up to which the block is composed of single ops on a GPU: there the host is the bound, and there
#: is little memory to save
_SMALL = 2**23


def gated_mlp(
    x: Tensor,
    gate_weight: Tensor,
    up_weight: Tensor | None,
    down_weight: Tensor,
    activation: str = "silu",
    gate_multiplier: float = 1.0,
) -> Tensor:
    """`(f(gate_multiplier * x @ gate_weight.T) * (x @ up_weight.T)) @ down_weight.T`, without its largest saved tensor.

    Args:
        x: (..., H), any strides. gate_weight, up_weight: (F, H); down_weight: (O, F); all of one floating dtype.
            `up_weight` None: gate_weight is (2F, H) and holds both, the gate first.
        activation: "silu", "gelu_tanh" or "gelu". gate_multiplier: a scalar, as in Falcon-H1.

    Returns: (..., O) in the dtype of x, each matrix product and the gated product rounded once.
    For backward it keeps x, gate and up (T (H + 2F) elements for T tokens), where single ops keep another T F.
    Under autocast and torch.compile, and for DTensors, it is composed of single ops.
    Raises: ValueError for an unknown activation or shapes that do not fit; TypeError for integers or other dtypes.
    """
    check_choice("activation", activation, ACTIVATIONS)
    check_floating(x=x, gate_weight=gate_weight, up_weight=up_weight, down_weight=down_weight)
    _check_shapes(x, gate_weight, up_weight, down_weight)
    weights = (gate_weight, up_weight, down_weight)
    autocast = torch.is_autocast_enabled(x.device.type)
    if not autocast and any(w is not None and w.dtype != x.dtype for w in weights):
        raise TypeError(
            f"x is {x.dtype}, but the weights are {', '.join(str(w.dtype) for w in weights if w is not None)}; "
            f"convert them with .to(), or use torch.autocast."
        )
    check_same_device(x=x, gate_weight=gate_weight, up_weight=up_weight, down_weight=down_weight)
    options = (activation, float(gate_multiplier))
    if torch.compiler.is_compiling():
        return reference.gated_mlp(x, *weights, *options)
    elements = x.numel() // max(1, x.shape[-1]) * down_weight.shape[1]
    if autocast or host_bound(x, _SMALL, elements) or any(map(is_dtensor, (x, *weights))):
        return _composed(x, *weights, *options)
    return _GatedMLP.apply(implementation("glu", x), options, x, *weights)


def _composed(
    x: Tensor,
    gate_weight: Tensor,
    up_weight: Tensor | None,
    down_weight: Tensor,
    activation: str,
    gate_multiplier: float,
) -> Tensor:
    linear = torch.nn.functional.linear
    gate = linear(x, gate_weight)
    if up_weight is None:
        return linear(glu_packed(gate, activation, gate_multiplier), down_weight)
    return linear(glu(gate, linear(x, up_weight), activation, gate_multiplier), down_weight)


class _GatedMLP(Op):
    """Its `impl` is that of `glu`."""

    @staticmethod
    def forward(ctx: Any, impl: Any, options: tuple[str, float], *tensors: Tensor | None) -> Tensor:
        x, gate_weight, up_weight, down_weight = tensors
        assert x is not None
        assert gate_weight is not None
        assert down_weight is not None
        rows = as_rows(x)  # (T, H)
        gate = torch.mm(rows, gate_weight.t())  # (T, F), or (T, 2F) with up
        up = None if up_weight is None else torch.mm(rows, up_weight.t())
        product, _ = impl.forward(gate, up, *options, 1.0, needs=(False, False))
        if any(ctx.needs_input_grad):
            ctx.save_for_backward(rows, gate, up, gate_weight, up_weight, down_weight)
            ctx.of_forward = impl, (*options, 1.0), x.shape
        y = x.new_empty(
            *x.shape[:-1], down_weight.shape[0]
        )  # no view: the caller may change it in place
        torch.mm(product, down_weight.t(), out=y.view(product.shape[0], down_weight.shape[0]))
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            return Op.backward(ctx, *grads)  # refuses
        rows, gate, up, gate_weight, up_weight, down_weight = ctx.saved_tensors
        impl, options, shape = ctx.of_forward
        needs_dx, needs_gate, needs_up, needs_down = ctx.needs_input_grad[2:]
        assert grads[0] is not None
        dy = as_rows(grads[0])
        dgate = dup = product = None
        if needs_dx or needs_gate or needs_up:
            dproduct = torch.mm(dy, down_weight)  # (T, F)
            both = (needs_dx or needs_gate, up is not None and (needs_dx or needs_up))
            dgate, dup, product = _backward_of_product(impl, dproduct, gate, up, options, both)
        elif needs_down:
            product, _ = impl.forward(gate, up, *options, needs=(False, False))
        down = torch.mm(dy.t(), product) if needs_down and product is not None else None
        del product
        dx = None
        if needs_dx and dgate is not None:
            dx = torch.mm(dgate, gate_weight)
            if dup is not None:
                dx.addmm_(dup, up_weight)
            dx = dx.view(shape)
        inner = (
            torch.mm(d.t(), rows) if need and d is not None else None
            for d, need in ((dgate, needs_gate), (dup, needs_up))
        )
        return None, None, dx, *inner, down


def _backward_of_product(
    impl: Any,
    dproduct: Tensor,
    gate: Tensor,
    up: Tensor | None,
    options: tuple[Any, ...],
    needs: tuple[bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor]:
    """(dgate, dup, the product itself); packed, dgate holds both. `dproduct` may be overwritten."""
    if hasattr(impl, "backward_with_output"):
        return (*impl.backward_with_output(dproduct, (gate, up), options, needs), dproduct)
    product, _ = impl.forward(gate, up, *options, needs=(False, False))
    return (*impl.backward((dproduct,), (gate, up), options, needs), product)


def _check_shapes(
    x: Tensor, gate_weight: Tensor, up_weight: Tensor | None, down_weight: Tensor
) -> None:
    shapes = [None if t is None else tuple(t.shape) for t in (gate_weight, up_weight, down_weight)]
    matrices = all(shape is None or len(shape) == 2 for shape in shapes)
    features = down_weight.shape[1] if matrices else 0
    inner = (features if up_weight is not None else 2 * features, x.shape[-1] if x.ndim else 0)
    if not matrices or shapes[0] != inner or shapes[1] not in (None, inner):
        raise ValueError(
            f"gate_weight {shapes[0]}, up_weight {shapes[1]} and down_weight {shapes[2]} do not fit each other and x "
            f"{tuple(x.shape)}: pass (F, H), (F, H) and (O, F), or (2F, H), None and (O, F), for x (..., H)."
        )
