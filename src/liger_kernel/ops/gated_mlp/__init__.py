"""The gated feed-forward block (Shazeer 2020, https://arxiv.org/abs/2002.05202) with its three matrix products.

Its product `f(gate) * up`, as large as the gate, is not kept for backward: the kernel that makes the gradients of gate
and up makes it once more, over the memory of its own gradient.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from liger_kernel._core.autograd import (
    Op,
    autocast_dtype,
    graph_is_kept,
    refuse_double_backward,
    saved_tensors_are_ours,
)
from liger_kernel._core.checks import check_floating, check_same_device
from liger_kernel._core.lazy import compat_names
from liger_kernel._core.shapes import as_rows
from liger_kernel.backends import host_bound
from liger_kernel.backends.dispatch import is_chosen, is_composed, is_plain, kernels_for
from liger_kernel.ops import OPS
from liger_kernel.ops.gated_mlp import reference
from liger_kernel.ops.glu import ACTIVATIONS, gate_options, gated_product
from liger_kernel.ops.glu.contract import GLUOptions

#: elements of the gate up to which the block is plain PyTorch on a GPU: there the host is the bound, and there is
#: little memory to save
_SMALL = 2**23


def gated_mlp(
    x: Tensor,
    gate_weight: Tensor,
    up_weight: Tensor | None,
    down_weight: Tensor,
    activation: str = "silu",
    gate_multiplier: float = 1.0,
    limit: float | None = None,
    alpha: float = 1.0,
) -> Tensor:
    """`(f(gate_multiplier * x @ gate_weight.T) * (x @ up_weight.T)) @ down_weight.T`, without its largest saved tensor.

    Args:
        x: (..., H), any strides. gate_weight, up_weight: (F, H); down_weight: (O, F); all of one floating dtype.
            `up_weight` None: gate_weight is (2F, H) and holds both, the gate first.
        activation, gate_multiplier, limit, alpha: as in `liger_kernel.ops.glu`.

    Returns: (..., O) in the dtype of x, each matrix product and the gated product rounded once.
    For backward it keeps x, gate and up (T (H + 2F) elements for T tokens), where single ops keep another T F.
    Under autocast and torch.compile, for DTensors, and where PyTorch's own operators compute, as on processors, it is
    composed of single ops.
    Raises: ValueError as `glu`, or for shapes that do not fit; TypeError for integers or other dtypes.
    """
    weights = (gate_weight, up_weight, down_weight)
    autocast = autocast_dtype(x) is not None
    check_tensors(x, *weights, autocast)
    composed = is_composed(x, *weights) or is_chosen("glu")
    usual = gate_multiplier == 1 and limit is None and alpha == 1 and activation in ACTIVATIONS
    if usual and not composed:
        elements = x.numel() // max(1, x.shape[-1]) * down_weight.shape[1]
        if elements <= _SMALL and host_bound(x, x.numel()):
            return reference.gated_mlp(x, *weights, activation, 1.0)
    glu = gate_options(activation, gate_multiplier, limit=limit, alpha=alpha)
    options: dict[str, Any] = {
        "activation": activation,
        "gate_multiplier": glu.gate_multiplier,
        "limit": glu.limit,
        "alpha": glu.alpha,
    }
    # x stands for the gate, which has its dtype and as many rows
    impl = None if composed or autocast else kernels_for("glu", glu, x, None)
    if impl is not None and is_plain(impl, x):
        return reference.gated_mlp(x, *weights, **options, product=impl.function)
    if (
        impl is None
        or not torch.is_grad_enabled()
        or not any(t is not None and t.requires_grad for t in (x, gate_weight, up_weight))
    ):
        return reference.gated_mlp(x, *weights, **options, product=gated_product)
    nodes: list[Any] = []  # `_Product` puts its node here, for `_Down`
    product = _Product.apply(impl, glu, nodes, x, *weights)
    return _Down.apply(nodes[0], product, down_weight)


class _Product(Op):
    """f(x @ gate.T) * (x @ up.T). It keeps what `_Down` reads, where its gradients are made.

    Its `impl` is that of `glu`: besides `forward` and `backward` it offers `backward_with_output`.

    `down_weight` is among its inputs, so that no backward through `_Down` leaves this node, and what it keeps, alive.
    """

    @staticmethod
    def forward(ctx: Any, impl: Any, options: GLUOptions, *tensors: Any) -> Tensor:
        nodes, x, gate_weight, up_weight, down_weight = tensors
        rows = as_rows(x)  # (T, H)
        gate = torch.mm(rows, gate_weight.t())  # (T, F), or (T, 2F) with up
        up = None if up_weight is None else torch.mm(rows, up_weight.t())
        product: Tensor = impl.forward(gate, up, options=options, needs=(False, False))[0]
        ctx.save_for_backward(rows, gate, up, gate_weight, up_weight, down_weight)
        ctx.of_forward = impl, options, x.shape
        ctx.held_by_us_alone = saved_tensors_are_ours()
        nodes.append(ctx)
        return product

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        found, ctx.found = ctx.found, None
        return None, None, None, *found, None


class _Down(torch.autograd.Function):
    """`product @ down_weight.T`, and the backward of the whole block.

    It saves nothing itself: a checkpointed layer stops recomputing when all that it saved is there again, and so never
    repeats this product.
    """

    @staticmethod
    def forward(ctx: Any, node: Any, product: Tensor, down_weight: Tensor) -> Tensor:
        ctx.node = node
        shape, n_out = node.of_forward[2], down_weight.shape[0]
        y = product.new_empty(*shape[:-1], n_out)  # no view: HF may change it in place
        torch.mm(product, down_weight.t(), out=y.view(product.shape[0], n_out))
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        refuse_double_backward()
        node = ctx.node
        rows, gate, up, gate_weight, up_weight, down_weight = node.saved_tensors
        impl, options, shape = node.of_forward
        needs_dx, needs_gate, needs_up = node.needs_input_grad[3:6]
        dy = as_rows(grads[0])
        dproduct = torch.mm(dy, down_weight)  # (T, F)
        needs = (needs_dx or needs_gate, up is not None and (needs_dx or needs_up))
        into = (gate, up) if node.held_by_us_alone and not graph_is_kept() else None
        found, product = impl.backward_with_output(
            dproduct, (gate, up), options=options, needs=needs, into=into
        )
        dgate, dup = found
        ddown = torch.mm(dy.t(), product) if ctx.needs_input_grad[2] else None
        dx = None
        if needs_dx:
            dx = torch.mm(dgate, gate_weight)
            if dup is not None:
                dx.addmm_(dup, up_weight)
            dx = dx.view(shape)
        inner = (
            torch.mm(d.t(), rows) if need and d is not None else None
            for d, need in ((dgate, needs_gate), (dup, needs_up))
        )
        node.found = (dx, *inner)
        return None, product, ddown  # the second is never read


def check_tensors(
    x: Tensor, gate_weight: Tensor, up_weight: Tensor | None, down_weight: Tensor, autocast: bool
) -> None:
    """Of `gated_mlp`."""
    features = down_weight.shape[-1] if down_weight.ndim == 2 else -1
    inner = (features if up_weight is not None else 2 * features, x.shape[-1] if x.ndim else -1)
    fit = gate_weight.shape == inner and (up_weight is None or up_weight.shape == inner)
    dtype, device = x.dtype, x.device
    for w in (gate_weight, up_weight, down_weight):
        if w is not None and (w.dtype != dtype or w.device != device):
            break
    else:
        if fit and dtype.is_floating_point:
            return  # the usual case, in one pass: every layer of a small model comes here
    named = {"gate_weight": gate_weight, "up_weight": up_weight, "down_weight": down_weight}
    weights = [w for w in named.values() if w is not None]
    check_floating(x=x, **named)
    if not fit:
        shapes = ", ".join(f"{k} {w if w is None else tuple(w.shape)}" for k, w in named.items())
        raise ValueError(
            f"{shapes} do not fit each other and x {tuple(x.shape)}: pass (F, H), (F, H) and (O, F), or (2F, H), None "
            f"and (O, F), for x (..., H)."
        )
    if not autocast and any(w.dtype != x.dtype for w in weights):
        raise TypeError(
            f"x is {x.dtype}, but the weights are {', '.join(str(w.dtype) for w in weights)}; "
            f"convert them with .to(), or use torch.autocast."
        )
    check_same_device(x=x, **named)


__getattr__ = compat_names(__name__, OPS["gated_mlp"])
