"""Linears with low-rank adapters (LoRA, Hu et al. 2021, https://arxiv.org/abs/2106.09685), a node for each.

An adapter adds two thin products, whose FLOPs are few, and then costs by what it moves: scaling and adding its result
are two passes over the output, and its share of the input's gradient is one more. Here all of them are the beta of a
matrix product. Linears that read the same input, as query, key and value do, add up its gradient in one buffer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from liger_kernel._core.autograd import (
    Recompute,
    autocast_dtype,
    graph_task,
    is_checkpointed,
    observes_saved_tensors,
    refuse_double_backward,
)
from liger_kernel._core.checks import check_floating, check_same_device
from liger_kernel._core.shapes import as_rows, in_dtype
from liger_kernel.backends import host_bound, kernels_of
from liger_kernel.backends.dispatch import is_composed
from liger_kernel.ops.lora_linear import reference, small
from liger_kernel.ops.lora_linear.small import Adapter

_MET = "_liger_met"
#: rank up to which kernels compute what an adapter adds
THIN = 64


class Quantised(NamedTuple):
    """A frozen weight (O, H) in fewer bits.

    dense: the weight in a dtype. dtype: of the products with it; None: that of x. forward: what its own layer makes of
    x, where that is no product with `dense`; backward is.
    """

    dense: Callable[[torch.dtype], Tensor]
    dtype: torch.dtype | None = None
    forward: Callable[[Tensor], Tensor] | None = None


def lora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    scaling: float = 1.0,
) -> Tensor:
    """`x @ weight.T + bias + scaling * (x @ lora_a.T) @ lora_b.T`, without a pass over memory for the adapter.

    Args:
        x: (..., H), any strides. weight: (O, H), bias: (O,) or None, in the dtype of x. lora_a: (r, H), lora_b: (O, r),
            in one dtype, that of x or a wider one, in which the adapter is computed then.
        scaling: in PEFT `lora_alpha / r`.

    Returns: (..., O) in the dtype of x; under autocast all is computed in its dtype. For backward it keeps
    `x @ lora_a.T` and, unless weight and lora_a are frozen, x; Linears that are given the same tensor keep it once,
    and add their gradients up in place.
    Under torch.compile and other transforms, and for DTensors, PyTorch's own ops compute.
    Raises: ValueError for shapes that do not fit, TypeError for integers and other mixes of dtypes.
    """
    check(x, weight, bias, lora_a, lora_b)
    if is_composed(x, weight, bias, lora_a, lora_b):
        return reference.lora_linear(x, weight, bias, lora_a, lora_b, float(scaling))
    return adapted(x, weight, bias, [Adapter(lora_a, lora_b, float(scaling))])


def adapted(
    x: Tensor,
    weight: Tensor | Quantised,
    bias: Tensor | None,
    adapters: Sequence[Adapter],
) -> Tensor:
    """`lora_linear` of several adapters; of tensors that fit. The result on a quantised weight has the dtype of x."""
    if small.serves(x, (weight, bias, adapters)):
        return small.adapted(x, (weight, bias, adapters))[0]
    dtype, of_x = autocast_dtype(x) or x.dtype, x.dtype
    norm = norm_of(x)
    x, meeting = _met(x, dtype)
    flat = (t for a in adapters for t in (a.lora_a, a.lora_b, a.dropped))
    scalings = [a.scaling for a in adapters]
    base = Base(dtype, of_x, weight) if isinstance(weight, Quantised) else Base(dtype, dtype)
    own = None if isinstance(weight, Quantised) else weight
    y: Tensor = _Adapted.apply((base, scalings, norm), meeting, x, own, bias, *flat)
    return y


#: (a, b, scaling) of thin products, scaling * a @ b each
Products = Sequence[tuple[Tensor, Tensor, float]]


class Base(NamedTuple):
    """What lies beneath the adapters. dtype: of its products and of the gradient of x, but where `quantised` says more.

    out: dtype of the result.
    """

    dtype: torch.dtype
    out: torch.dtype
    quantised: Quantised | None = None

    @property
    def product(self) -> torch.dtype:
        return (self.quantised and self.quantised.dtype) or self.dtype

    def dense(self, weight: Tensor | None) -> Tensor:
        """The weight for a product; of a quantised one, `weight` was made before, or is None."""
        if self.quantised is not None and weight is None:
            return self.quantised.dense(self.product)
        assert weight is not None
        return in_dtype(weight, self.product)

    def forward(
        self, x: Tensor, weight: Tensor | None, bias: Tensor | None, products: Products
    ) -> tuple[Tensor, Tensor | None]:
        """The base's own result and `products`, and the weight that a backward may use: where it was made for this.

        The thin products come first, where that of the base can add them as its GEMM writes: they are a pass over
        the output then, and would be two.
        """
        bias = None if bias is None else in_dtype(bias, self.product)
        if self.quantised is not None and self.quantised.forward is not None:
            y = self.quantised.forward(x).to(self.out)
            _add_products(y.view(-1, y.shape[-1]), products)
            return y, None
        dense = self.dense(weight)
        kept = weight if self.quantised is None else dense
        if not products or self.out != self.product or bias is not None:
            y = in_dtype(F.linear(in_dtype(x, self.product), dense, bias), self.out)
            _add_products(y.view(-1, y.shape[-1]), products)
            return y, kept
        rows = in_dtype(as_rows(x), self.product)
        y = rows.new_empty(*x.shape[:-1], dense.shape[0])  # no view: HF may change it in place
        flat = y.view(-1, dense.shape[0])
        _add_products(flat, products, fresh=True)
        flat.addmm_(rows, dense.t())
        return y, kept

    def keeps(self, dense: Tensor | None, x: Tensor, y: Tensor) -> bool:
        """Whether backward is given the weight, rather than to make it again.

        So it is in the forward that a checkpoint repeats, whose backward comes at once; if it takes no more memory than
        what else is kept for that.
        """
        if self.quantised is None or dense is None:
            return True
        return is_checkpointed() and dense.numel() <= x.numel() + y.numel()

    def backward(
        self, dy: Tensor, weight: Tensor | None, total: Tensor | None, products: Products = ()
    ) -> Tensor:
        """dy @ weight (T, H), added to `total` in place; with `products` where there is none yet."""
        dense, dy = self.dense(weight), in_dtype(dy, self.product)
        if total is None and self.product == self.dtype and products:
            total = dy.new_empty(dy.shape[0], dense.shape[1])
            _add_products(total, products, fresh=True)
        elif total is None:
            total = in_dtype(torch.mm(dy, dense), self.dtype)
            _add_products(total, products)
            return total
        if self.product == self.dtype:
            return total.addmm_(dy, dense)
        return total.add_(torch.mm(dy, dense))


class _Part(NamedTuple):
    """What one product with x asks of the gradient of x: dy @ weight, and thin products of its adapters."""

    base: Base
    dy: Tensor
    weight: Tensor | None
    products: Products


class _Meeting(torch.autograd.Function):
    """Where the gradients of an input of several products add up, in one buffer, before they go on to it.

    All are made here: the thin ones come first, as one, and the GEMM of each base adds its own.
    It returns an empty tensor, which only ties the products to this node: one that shared the memory of x would keep x
    alive, which keeps it.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.of_task = None
        ctx.shape = x.shape
        return x.new_empty(0)

    @staticmethod
    def backward(ctx: Any, *grads: None) -> Tensor | None:
        refuse_double_backward()
        parts, ctx.of_task = _parts(ctx), None
        total, thin = None, _joined([product for part in parts for product in part.products])
        for base, dy, weight, _ in parts:
            total = base.backward(dy, weight, total, thin)
        return None if total is None else total.view(ctx.shape)


def _parts(node: Any) -> list[_Part]:
    """What has come in this backward; one that stopped before this node may have left its own."""
    task, parts = node.of_task or (None, [])
    return parts if task == graph_task() else []


def _joined(products: Products) -> Products:
    """Thin products (T, H) as one where their dtypes allow it: one pass over memory for all. Their scaling is 1."""
    if len(products) < 2 or len({(a.dtype, b.dtype) for a, b, _ in products}) > 1:
        return products
    return [(torch.cat([a for a, *_ in products], 1), torch.cat([b for _, b, _ in products]), 1.0)]


def _met(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """The numbers of x in `dtype`, and where its gradients meet: once for all that read x as it is now."""
    if not (x.requires_grad and torch.is_grad_enabled()):
        return x.to(dtype), None
    key = (x._version, dtype)
    before = None if x.is_leaf else x.__dict__.get(_MET)
    if before is None or before[0] != key:
        before = key, _Meeting.apply(x), None if x.dtype == dtype else x.detach().to(dtype)
        if not x.is_leaf:  # the node of a leaf holds it: what it held in turn would never be freed
            x.__dict__[_MET] = before
    _, meeting, converted = before
    return x.detach() if converted is None else converted, meeting


class _Adapted(torch.autograd.Function):
    """options: the base, the scalings, and the norm that made x.

    Then where gradients of x meet, x, weight, bias, and (A, B, dropped) of each adapter.
    """

    @staticmethod
    def forward(ctx: Any, options: Any, meeting: Tensor | None, *tensors: Any) -> Tensor:
        base, scalings, norm = options
        x, weight, bias, *flat = tensors
        ctx.set_materialize_grads(False)
        autocast = autocast_dtype(x) is not None
        rows = as_rows(x)
        needs = ctx.needs_input_grad[2:]
        middles, products = [], []
        reads: list[Tensor | None] = [None] * len(scalings)
        for i, scaling in enumerate(scalings):
            lora_a, lora_b, dropped = flat[3 * i : 3 * i + 3]
            wide = base.dtype if autocast else lora_a.dtype
            read = in_dtype(rows if dropped is None else as_rows(dropped), wide)
            if dropped is not None and needs[3 + 3 * i]:
                reads[i] = read
            middle = torch.mm(read, in_dtype(lora_a, wide).t())  # (T, r)
            middles.append(middle)
            products.append((middle, in_dtype(lora_b, wide).t(), scaling))
        y, weight = base.forward(x, weight, bias, products)
        drops = [dropped is not None for dropped in flat[2::3]]
        ctx.of_forward = options, drops, x.shape, None if meeting is None else meeting.grad_fn
        reads_x = zip(needs[3::3], drops, strict=True)  # frozen weights ask for no x
        kept = needs[1] or (norm is None and any(need and not drop for need, drop in reads_x))
        weight = weight if base.keeps(weight, x, y) else None
        ctx.save_for_backward(
            rows if kept else None, weight, *flat[0::3], *flat[1::3], *reads, *middles
        )
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        refuse_double_backward()
        (base, scalings, norm), drops, shape, meeting = ctx.of_forward
        needs = ctx.needs_input_grad[2:]
        if grads[0] is None:
            return (None,) * (2 + len(needs))
        rows, weight, *rest = ctx.saved_tensors
        n = len(scalings)
        lora_as, lora_bs, reads, middles = (rest[i * n : i * n + n] for i in range(4))
        dy = as_rows(grads[0])
        found: list[Tensor | None] = [None] * (3 * n)
        inner, products = [], []
        for i, scaling in enumerate(scalings):
            wide = in_dtype(dy, middles[i].dtype)
            lora_a, lora_b = in_dtype(lora_as[i], wide.dtype), in_dtype(lora_bs[i], wide.dtype)
            g, db = gradients(wide, middles[i], lora_b, scaling, needs[4 + 3 * i])
            inner.append(g)
            if needs[5 + 3 * i]:
                found[3 * i + 2] = torch.mm(g, lora_a).view(shape)
            elif not drops[i]:
                products.append((g, lora_a, 1.0))
            found[3 * i + 1] = db
        if meeting is not None:  # else x needs no gradient
            parts = [*_parts(meeting), _Part(base, dy, weight, products)]
            meeting.of_task = graph_task(), parts
        for i, g in enumerate(inner):
            if needs[3 + 3 * i]:
                read, made_by = (reads[i], None) if drops[i] else (rows, norm)
                found[3 * i] = of_a(g, read, made_by)
        dw = torch.mm(dy.t(), rows.to(base.dtype)) if needs[1] else None
        db = dy.sum(0) if needs[2] else None
        return None, None, None, dw, db, *found


def gradients(
    dy: Tensor, middle: Tensor, lora_b: Tensor, scaling: float, needs_db: bool = True
) -> tuple[Tensor, Tensor | None]:
    """scaling dy B (T, r), and the gradient of B, scaling dy^T middle (O, r), of tensors in one dtype."""
    large = dy.dtype.itemsize == 2 and lora_b.shape[1] <= THIN and not host_bound(dy, 2**22)
    if needs_db and large and middle.shape[0]:
        kernels = kernels_of("lora_linear", dy)
        if not isinstance(kernels, Recompute):
            found: tuple[Tensor, Tensor] = kernels.thin_gradients(dy, middle, lora_b, scaling)
            return found
    db = scaled(dy.t(), middle, scaling) if needs_db else None
    return scaled(dy, lora_b, scaling), db


def scaled(a: Tensor, b: Tensor, scaling: float, out: Tensor | None = None) -> Tensor:
    """scaling * a @ b, in one pass."""
    out = a.new_empty(a.shape[0], b.shape[1]) if out is None else out
    return out.addmm_(a, b, beta=0, alpha=scaling)


def norm_of(x: Tensor) -> Any:
    """The node of the norm that made x, if backward can do with what that keeps; nobody else keeps it then.

    Its input times 1 / rms may exceed what float16 holds, and hooks on saved tensors may hand out each of them once. A
    small x is no memory to speak of, and two more launches.
    """
    node: Any = x.grad_fn
    impl = getattr(node, "of_forward", (None,))[0]
    if not hasattr(impl, "factors") or x.output_nr or x.dtype == torch.float16:
        return None
    return None if observes_saved_tensors() or host_bound(x, 2**23) else node


def of_a(inner: Tensor, rows: Tensor | None, norm: Any = None) -> Tensor:
    """inner.T @ x (R, H), the gradient of A; of x as `rows`, or of what the norm keeps that made it."""
    if norm is None or rows is not None:
        assert rows is not None
        return torch.mm(inner.t(), in_dtype(rows, inner.dtype))
    impl, options, _ = norm.of_forward
    rows, rstd, weight = impl.factors(norm.saved_tensors, options)
    scaled_rows = torch.mul(inner, rstd[:, None], out=torch.empty_like(inner))
    found = torch.mm(scaled_rows.t(), in_dtype(rows, inner.dtype))
    return found if weight is None else found.mul_(weight)


def _add_products(into: Tensor, products: Products, fresh: bool = False) -> None:
    """into += scaling * a @ b for each of them; `fresh`: there is nothing in it yet.

    Thin factors that are wider than `into` (T, O) are rounded first, which adds less than the rounding of the sum: a
    product in fp32 beside a sum in 16 bits would be four passes over memory.
    """
    dtype = into.dtype
    for i, (a, b, scaling) in enumerate(products):
        beta = 0 if fresh and i == 0 else 1
        into.addmm_(in_dtype(a, dtype), in_dtype(b, dtype), beta=beta, alpha=scaling)


def check(x: Tensor, weight: Tensor, bias: Tensor | None, lora_a: Tensor, lora_b: Tensor) -> None:
    named = {"x": x, "weight": weight, "bias": bias, "lora_a": lora_a, "lora_b": lora_b}
    check_floating(**named)
    check_same_device(**named)
    n_in, (n_out, rank) = x.shape[-1] if x.ndim else -1, (weight.shape[:1] + lora_a.shape[:1])
    wanted: dict[str, tuple[int, ...]] = {
        "weight": (n_out, n_in),
        "lora_a": (rank, n_in),
        "lora_b": (n_out, rank),
    }
    wanted |= {} if bias is None else {"bias": (n_out,)}
    shapes = {name: tuple(named[name].shape) for name in wanted}  # type: ignore[union-attr]
    if shapes != wanted:
        told = ", ".join(f"{name} {shape}" for name, shape in shapes.items())
        raise ValueError(
            f"{told} do not fit each other and x {tuple(x.shape)}; pass weight (O, H), bias (O,), lora_a (r, H) and "
            f"lora_b (O, r) for x (..., H)."
        )
    if autocast_dtype(x) is not None:
        return
    widened = torch.promote_types(x.dtype, lora_a.dtype)
    base = {t.dtype for t in (x, weight, bias) if t is not None}
    if len(base) > 1 or lora_a.dtype != lora_b.dtype or widened != lora_a.dtype:
        dtypes = ", ".join(f"{name} {t.dtype}" for name, t in named.items() if t is not None)
        raise TypeError(
            f"dtypes do not fit: {dtypes}; weight and bias have that of x, the adapter one, as wide or wider. "
            f"Convert them with .to(), or use torch.autocast."
        )
