"""The gated feed-forward block of frozen Linears with low-rank adapters (LoRA, https://arxiv.org/abs/2106.09685).

Adapters that read the same input are one thin product with it. As in `ops/gated_mlp`, the product `f(gate) * up` is not
kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from liger_kernel._core.autograd import (
    Op,
    Recompute,
    autocast_dtype,
    graph_is_kept,
    graph_task,
    refuse_double_backward,
    saved_tensors_are_ours,
)
from liger_kernel._core.shapes import as_rows, in_dtype
from liger_kernel.backends import host_bound, kernels_of
from liger_kernel.backends.dispatch import is_chosen, is_composed, kernels_for
from liger_kernel.ops.glu import gate_options, gated_product, glu
from liger_kernel.ops.glu.contract import GLUOptions
from liger_kernel.ops.lora_linear import (
    Adapter,
    Base,
    Products,
    Quantised,
    check,
    gradients,
    lora_linear,
    norm_of,
    of_a,
    scaled,
    small,
)
from liger_kernel.ops.lora_mlp import reference
from liger_kernel.ops.lora_mlp.contract import Thin


class Layer(NamedTuple):
    """A Linear (H, O) that is frozen, and its adapters, none of which drops anything."""

    weight: Tensor | Quantised
    bias: Tensor | None
    adapters: Sequence[Adapter] = ()


def lora_mlp(
    x: Tensor,
    gate_weight: Tensor,
    up_weight: Tensor,
    down_weight: Tensor,
    gate_a: Tensor,
    gate_b: Tensor,
    up_a: Tensor,
    up_b: Tensor,
    down_a: Tensor,
    down_b: Tensor,
    scaling: float = 1.0,
    activation: str = "silu",
) -> Tensor:
    """`down(f(gate(x)) * up(x))` of three `lora_linear`s.

    Args:
        x: (..., H), any strides. gate_weight, up_weight: (F, H), down_weight: (O, F), in the dtype of x; a: (r, H) or
            (r, F), b: (F, r) or (O, r), with ranks of their own, in one dtype, that of x or a wider one.
        scaling: of all three. activation: as in `glu`.

    Returns: (..., O) in the dtype of x. For backward it keeps x, gate and up. Where the weights are trained, too, it is
    composed of single ops, as it is under autocast, torch.compile and other transforms, and for DTensors.
    Raises: ValueError for an unknown activation or shapes that do not fit, TypeError for other dtypes.
    """
    options = gate_options(activation, 1.0)
    tensors = (gate_weight, up_weight, down_weight, gate_a, gate_b, up_a, up_b, down_a, down_b)
    if is_composed(x, *tensors) and not is_chosen("glu"):
        return reference.lora_mlp(x, *tensors, scaling=float(scaling), activation=activation)
    gate = Layer(gate_weight, None, [Adapter(gate_a, gate_b, float(scaling))])
    up = Layer(up_weight, None, [Adapter(up_a, up_b, float(scaling))])
    down = Layer(down_weight, None, [Adapter(down_a, down_b, float(scaling))])
    if autocast_dtype(x) is None and is_served(x, gate, up, down):
        check(x, gate_weight, None, gate_a, gate_b)
        check(x, up_weight, None, up_a, up_b)
        for weight in (gate_weight, up_weight):
            check(x.new_empty(0, weight.shape[0]), down_weight, None, down_a, down_b)
        return adapted(x, gate, up, down, options)
    gated = lora_linear(x, gate_weight, None, gate_a, gate_b, scaling)
    product = glu(gated, lora_linear(x, up_weight, None, up_a, up_b, scaling), activation)
    return lora_linear(product, down_weight, None, down_a, down_b, scaling)


def is_served(x: Tensor, gate: Layer, up: Layer | None, down: Layer) -> bool:
    """Whether `adapted` has a gradient to compute now, and computes all that there are."""
    if not torch.is_grad_enabled() or is_chosen("glu"):
        return False
    dtypes, trained = set(), x.requires_grad
    for layer in (gate, up, down):
        if layer is None:
            continue
        for fixed in layer[:2]:
            if isinstance(fixed, Tensor) and fixed.requires_grad:
                return False
        for a in layer.adapters:
            dtypes.add(a.lora_a.dtype)
            trained = trained or a.lora_a.requires_grad or a.lora_b.requires_grad
    return trained and len(dtypes) == 1


def adapted(
    x: Tensor,
    gate: Layer,
    up: Layer | None,
    down: Layer,
    options: GLUOptions,
    read: bool = True,
) -> Tensor:
    """The block, of tensors that fit and are served; without `up`, the gate (H, 2F) holds both.

    read: whether somebody reads the numbers. If not, they are zeros without memory, and only the gradients are right.
    """
    layers = (gate, down) if up is None else (gate, up, down)
    if small.serves(x, *layers):
        gated, *ups = small.adapted(x, *layers[:-1])
        product = gated_product(gated, ups[0] if ups else None, **options.named())
        return small.adapted(product, down)[0]
    autocast = autocast_dtype(x)
    dtype = autocast or x.dtype
    thin = [a for layer in layers for a in layer.adapters]
    wide = dtype if autocast is not None else thin[0].lora_a.dtype
    impl = kernels_for("glu", options, x, None)
    bases = [
        Base(dtype, x.dtype, la.weight) if isinstance(la.weight, Quantised) else Base(dtype, dtype)
        for la in layers
    ]
    kernels = _kernels(x, layers, bases, wide)
    block = _Block(impl, kernels, options, layers, bases, wide, read, norm_of(x))
    nodes: list[Any] = []  # `_Product` puts there what `_Down` needs of it
    product = _Product.apply(block, nodes, x, *(t for a in thin for t in a[:2]))
    y: Tensor = _Down.apply(block, *nodes, product)
    return y


def _kernels(x: Tensor, layers: Sequence[Layer], bases: Sequence[Base], wide: torch.dtype) -> Any:
    """What makes the thin products of gate and up beside the gated one, if each Linear has one; else None."""
    adapters = [la.adapters[0] for la in layers if len(la.adapters) == 1]
    fit = len(adapters) == len(layers) == 3 and {base.out for base in bases} == {wide}
    if not fit or wide.itemsize != 2 or not x.numel() or host_bound(x, 2**22):
        return None
    kernels = kernels_of("lora_mlp", x)
    if isinstance(kernels, Recompute):
        return None
    return kernels if all(0 < a.lora_a.shape[0] <= kernels.RANK for a in adapters) else None


@dataclass(frozen=True)
class _Block:
    """impl: the kernels of `glu`. kernels: see `_kernels`. wide: dtype of the adapters' products.

    norm: the node of the norm that made x, see `norm_of`.
    """

    impl: Any
    kernels: Any
    options: GLUOptions
    layers: tuple[Layer, ...]
    bases: list[Base]
    wide: torch.dtype
    read: bool
    norm: Any

    def weight(self, i: int) -> Tensor | None:
        found = self.layers[i].weight
        return found if isinstance(found, Tensor) else None

    def middle(self, rows: Tensor, lora_as: Sequence[Tensor]) -> Tensor | None:
        """rows @ A.T (T, R) of all adapters that read them, side by side."""
        return torch.mm(in_dtype(rows, self.wide), self.stacked(lora_as).t()) if lora_as else None

    def stacked(self, lora_as: Sequence[Tensor]) -> Tensor:
        """(R, H)"""
        return in_dtype(lora_as[0] if len(lora_as) == 1 else torch.cat(list(lora_as)), self.wide)

    def products(
        self, layers: Sequence[Layer], middle: Tensor | None, lora_bs: Sequence[Tensor]
    ) -> list[list[tuple[Tensor, Tensor, float]]]:
        """What the adapters of each of these layers add to its result."""
        found, at, i = [], 0, 0
        for layer in layers:
            of_layer = []
            for adapter in layer.adapters:
                rank = adapter.lora_a.shape[0]
                assert middle is not None
                part = middle[:, at : at + rank]
                of_layer.append((part, in_dtype(lora_bs[i], self.wide).t(), adapter.scaling))
                at, i = at + rank, i + 1
            found.append(of_layer)
        return found

    def gated(
        self, outs: Sequence[Tensor], products: Sequence[Products], lora_as: Sequence[Tensor]
    ) -> tuple[Tensor, Tensor | None]:
        """The product of gate and up, and product @ A.T (T, R) of the Linear after it."""
        if self.kernels is not None:
            a, options = self.stacked(lora_as), self.options
            found: tuple[Tensor, Tensor] = self.kernels.forward(
                *outs, *map(_thin, products), a, options=options
            )
            return found
        gate, up = outs[0], outs[1] if len(outs) > 1 else None
        forward = self.impl.forward
        product: Tensor = forward(gate, up, options=self.options, needs=(False, False))[0]
        return product, self.middle(product, lora_as)

    def gradients(
        self, products: Sequence[tuple[Tensor, Products]]
    ) -> tuple[Tensor | None, list[Tensor]]:
        """Of (dy, products) of layers that read the same rows: dy @ B (T, R), side by side, and the gradients of B."""
        gs: list[Tensor] = []
        dbs: list[Any] = []
        for dy, of_layer in products:
            dy = in_dtype(dy, self.wide)
            for a, b, scaling in of_layer:
                g, db = gradients(dy, a, b.t(), scaling)
                gs.append(g)
                dbs.append(db)
        return (torch.cat(gs, 1) if len(gs) > 1 else gs[0]) if gs else None, dbs


class _Product(Op):
    """f(gate(x)) * up(x). It keeps what `_Down` reads, where its gradients are made: a checkpoint repeats no more."""

    @staticmethod
    def forward(ctx: Any, block: _Block, nodes: Any, *tensors: Any) -> Tensor:
        x, *flat = tensors
        first, down, dtype = block.layers[:-1], block.layers[-1], block.bases[0].dtype
        n = sum(len(layer.adapters) for layer in first)
        lora_as, lora_bs = flat[0::2], flat[1::2]
        rows = in_dtype(as_rows(x), dtype)
        middle = block.middle(rows, lora_as[:n])
        products = block.products(first, middle, lora_bs[:n])
        outs, kept = [], []
        for i, (layer, base) in enumerate(zip(first, block.bases, strict=False)):
            adds = products[i] if block.kernels is None else ()
            out, weight = base.forward(rows, block.weight(i), layer.bias, adds)
            kept.append(weight if base.keeps(weight, rows, out) else None)
            outs.append(out)
        product, middle_down = block.gated(outs, products, lora_as[n:])
        gate, up = outs[0], outs[1] if len(outs) > 1 else None
        (of_down,) = block.products([down], middle_down, lora_bs[n:])
        keeps_x = block.norm is None and any(ctx.needs_input_grad[3 : 3 + 2 * n : 2])
        ctx.save_for_backward(
            rows if keeps_x else None, gate, up, middle, middle_down, block.weight(-1), *kept, *flat
        )
        ctx.block, ctx.shape, ctx.of_x, ctx.n = block, x.shape, x.dtype, n
        ctx.held_by_us_alone = saved_tensors_are_ours()
        nodes += ctx, of_down
        return product

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        found, ctx.found = ctx.found, None
        return None, None, *found


class _Down(torch.autograd.Function):
    """down(product), and the backward of the whole block. It saves nothing itself, see `_Product`."""

    @staticmethod
    def forward(ctx: Any, block: _Block, node: Any, of_down: Products, product: Tensor) -> Tensor:
        ctx.node, ctx.dense = node, None
        base, layer, weight = block.bases[-1], block.layers[-1], block.weight(-1)
        outer = node.shape[:-1]
        if not block.read and (weight is not None or layer.adapters):
            n_out = (layer.adapters[0].lora_b if weight is None else weight).shape[0]
            return product.new_zeros((), dtype=base.out).expand(*outer, n_out)
        product = product.view(*outer, product.shape[-1])
        y, dense = base.forward(product, weight, layer.bias, of_down)
        if weight is None and graph_task() != -1 and base.keeps(dense, product, y):
            ctx.dense = dense  # a checkpoint is repeated, whose backward comes at once
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        refuse_double_backward()
        node = ctx.node
        block, n = node.block, node.n
        first, down = block.layers[:-1], block.layers[-1]
        rows, gate, up, middle, middle_down, weight, *rest = node.saved_tensors
        weights, flat = rest[: len(first)], rest[len(first) :]
        lora_as, lora_bs = flat[0::2], flat[1::2]
        dy = as_rows(grads[0])
        (of_down,) = block.products([down], middle_down, lora_bs[n:])
        of_first = block.products(first, middle, lora_bs[:n])

        inner, dbs_down = block.gradients([(dy, of_down)])
        more = [] if inner is None else [(inner, block.stacked(lora_as[n:]), 1.0)]
        dense = weight if ctx.dense is None else ctx.dense
        into = (gate, up) if node.held_by_us_alone and not graph_is_kept() else None
        if block.kernels is not None:
            dproduct = block.bases[-1].backward(dy, dense, None)
            dgate, dup, *dbs, da = block.kernels.backward(
                dproduct,
                gate,
                up,
                *map(_thin, of_first),
                *more[0][:2],
                options=block.options,
                into=into,
            )
            das_down = [da]
            inner = _inner((dgate, dup), of_first)
        else:
            dproduct = block.bases[-1].backward(dy, dense, None, more)
            (dgate, dup), product = block.impl.backward_with_output(
                dproduct, (gate, up), options=block.options, needs=(True, up is not None), into=into
            )  # the product is made again, in the memory of its gradient
            das_down = _of_as(inner, product, lora_as[n:])
            pre = [d for d in (dgate, dup) if d is not None]
            inner, dbs = block.gradients(list(zip(pre, of_first, strict=True)))
        dx = None
        if node.needs_input_grad[2]:
            more = [] if inner is None else [(inner, block.stacked(lora_as[:n]), 1.0)]
            dx = block.bases[0].backward(dgate, weights[0], None, more)
            if dup is not None:
                dx = block.bases[1].backward(dup, weights[1], dx)
            dx = in_dtype(dx, node.of_x).view(node.shape)
        keeps_none = rows is None and block.norm is None
        das = [None] * n if keeps_none else _of_as(inner, rows, lora_as[:n], block.norm)
        pairs = zip((*das, *das_down), (*dbs, *dbs_down), strict=True)
        node.found = (dx, *(g for pair in pairs for g in pair))
        return None, None, None, dproduct  # never read


def _thin(products: Products) -> Thin:
    ((middle, b, scaling),) = products
    return Thin(middle, b.t(), scaling)


def _inner(grads: Sequence[Tensor], products: Sequence[Products]) -> Tensor:
    """scaling * dy @ B (T, R) of layers with an adapter each, side by side."""
    ranks = [b.shape[0] for ((_, b, _),) in products]
    inner = grads[0].new_empty(grads[0].shape[0], sum(ranks))
    parts = inner.split(ranks, 1)
    for dy, ((_, b, scaling),), part in zip(grads, products, parts, strict=True):
        scaled(dy, b.t(), scaling, out=part)
    return inner


def _of_as(
    inner: Tensor | None, rows: Tensor | None, lora_as: Sequence[Tensor], norm: Any = None
) -> list[Tensor]:
    """The gradients of A: (dy @ B).T @ rows, as one product."""
    if inner is None:
        return []
    found = of_a(inner, rows, norm)
    return list(found.split([a.shape[0] for a in lora_as])) if len(lora_as) > 1 else [found]
