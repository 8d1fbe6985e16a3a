"""Logits that are not computed yet.

While a patched model runs with labels, its head returns a `DeferredLogits` instead of a tensor. HF's own code then
casts, scales, soft-caps, slices and flattens it; each of these is only recorded. When the recording reaches
`torch.nn.functional.cross_entropy`, the fused loss runs through the outermost callable around the head, so that FSDP,
ZeRO and offloading gather the weight at that moment. Anything this file does not know makes real logits by replaying
the recording on the head's real output: slower, never wrong.

It is a plain object with `__torch_function__`, not a Tensor subclass: `torch.compile` traces through it.
"""

from __future__ import annotations

import copy
import operator
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_leaves

from liger_kernel.transformers.patching import heads
from liger_kernel.transformers.patching.last_dimension import (
    is_bias,
    keeps_last_dimension,
    without_classes,
)
from liger_kernel.transformers.patching.origin import Modes, Origin
from liger_kernel.transformers.patching.waiting import Delayed, delegate, real


@dataclass(frozen=True)
class Fused:
    """How to get the recorded value without the logits: softcap(scale * (head(hidden) + bias)), in fp32."""

    hidden: Tensor
    scale: float = 1.0
    softcap: float | None = None
    classes: int | None = None  # of the head's, the first so many
    in_tanh: bool = False  # tanh(scale * logits): a soft cap whose last factor is still to come
    bias: Tensor | None = None  # (V,), beside that of the head

    def but(self, **changes: Any) -> Fused:
        """`dataclasses.replace`, which torch.compile of torch 2.6 cannot trace."""
        same = {"hidden": self.hidden, "scale": self.scale, "softcap": self.softcap}
        more = {"classes": self.classes, "in_tanh": self.in_tanh, "bias": self.bias}
        return Fused(**{**same, **more, **changes})


class LossRequest:
    """What the head's `forward` computes instead of logits. No dataclass: FSDP1 would make another one of it."""

    def __init__(
        self, target: Tensor, fused: Fused, arguments: dict[str, Any], run: Callable[..., Any]
    ):
        self.target, self.fused, self.arguments, self.run = target, fused, arguments, run
        self.refused: str | None = None  # why the head returned logits all the same
        self.low_rank: tuple[Tensor, Tensor] | None = (
            None  # what adapters of the head add to logits
        )


#: recorded operations by their names; those of the first kind act on each element
_ELEMENTWISE: dict[str, Callable[..., Any]] = {
    "to": Tensor.to,
    "add": operator.add,
    "mul": operator.mul,
    "div": operator.truediv,
    "tanh": torch.tanh,
}
_OPERATIONS: dict[str, Callable[..., Any]] = {
    **_ELEMENTWISE,
    "contiguous": Tensor.contiguous,
    "reshape": Tensor.reshape,
    "getitem": operator.getitem,
}


class DeferredLogits(Delayed):
    """See the module docstring. `chain` has the recorded operations: their names, arguments and keywords.

    The last of them was applied to `parent`. Once one is real, all that came from the same head are, each made of its
    parent's tensor, so that what is written into one of them is seen in those that are views of it, and in no other.
    """

    def __init__(
        self,
        origin: Origin,
        parent: DeferredLogits | None,
        chain: tuple[tuple[str, tuple[Any, ...], dict[str, Any]], ...],
        fused: Fused | None,
        dtype: torch.dtype,
        device: torch.device,
    ):
        self._origin, self._parent, self._chain, self._fused = origin, parent, chain, fused
        self._dtype, self._device = dtype, device
        self._shape: torch.Size | None = None
        self._real: Tensor | None = None
        if origin.call is not None and not torch.compiler.is_compiling():
            origin.family.append(weakref.ref(self))

    @classmethod
    def of(cls, origin: Origin) -> DeferredLogits:
        hidden = origin.hidden
        dtype = origin.modes.dtype_of(hidden)
        return cls(origin, None, (), Fused(hidden), dtype, hidden.device)

    @property
    def is_real(self) -> bool:
        """Whether somebody needed the logits themselves."""
        return self._real is not None

    # -- real logits ------------------------------------------------------------------------------------------------

    def materialize(self) -> Tensor:
        """The real logits, made once by the head's own call and the recorded operations, as the forward would have."""
        if self._real is None:
            origin = self._origin
            origin.look_around()
            with origin.modes.on(origin.hidden, Modes.now(origin.modes.device)):
                for one in (*origin.relatives(), self):
                    one._make()
        return cast(Tensor, self._real)

    def _make(self) -> Tensor:
        if self._real is None and self._parent is None:
            self._real = self._origin.materialize()
        elif self._real is None:
            name, args, kwargs = self._chain[-1]
            self._real = _OPERATIONS[name](cast(Any, self._parent)._make(), *args, **kwargs)
        return self._real

    def leave(self) -> None:
        """The forward is over: from now on this only stands for its value."""
        self._shape = self.shape
        self._fused = None
        if not torch.compiler.is_compiling():
            self._origin.keep(tree_leaves([args for _, args, _ in self._chain]))

    def _then(
        self,
        fused: Fused | None,
        name: str,
        *args: Any,
        dtype: torch.dtype | None = None,
        device: torch.device | None = None,
        **kwargs: Any,
    ) -> Any:
        """The value after one more operation; real at once where the fused loss could not express it.

        After the forward there is no loss any more, and casts and moves, by accelerate for one, are all that can wait.
        """
        if self._shape is not None:
            waits = name == "to"
        else:
            waits = fused is not None and not self._origin.look_around()
        if self._real is not None or not waits:
            return _OPERATIONS[name](self.materialize(), *args, **kwargs)
        after = DeferredLogits(
            self._origin,
            self,
            (*self._chain, (name, args, kwargs)),
            fused,
            dtype or self._dtype,
            device or self._device,
        )
        after._shape = self._shape
        return after

    # -- what HF's forwards do to logits before the loss ------------------------------------------------------------

    @property
    def shape(self) -> torch.Size:
        if self._shape is not None:
            return self._shape
        if self._real is not None or self._fused is None:
            return self.materialize().shape
        classes = self._fused.classes or self._origin.classes
        return torch.Size((*self._fused.hidden.shape[:-1], classes))

    def size(self, dim: int | None = None) -> Any:
        return self.shape if dim is None else self.shape[dim]

    @property
    def ndim(self) -> int:
        return len(self.shape)

    def dim(self) -> int:
        return len(self.shape)

    def __len__(self) -> int:
        return self.shape[0]

    @property
    def dtype(self) -> torch.dtype:
        return self._dtype if self._real is None else self._real.dtype

    @property
    def device(self) -> torch.device:
        return self._device if self._real is None else self._real.device

    @property
    def requires_grad(self) -> bool:
        if self._real is not None:
            return self._real.requires_grad
        return self._origin.modes.grad and heads.requires_grad(
            self._origin.around, self._origin.hidden
        )

    def _cast(self, dtype: torch.dtype) -> Any:
        return self._then(self._fused, "to", dtype, dtype=dtype)

    def float(self) -> Any:
        return self._cast(torch.float32)

    def to(self, *args: Any, **kwargs: Any) -> Any:
        device, dtype, _, _ = torch._C._nn._parse_to(*args, **kwargs)
        # accelerate moves all outputs of a model on several devices to that of its inputs
        if device is not None and device != self.device:
            return self._then(
                self._fused, "to", device, dtype or self._dtype, dtype=dtype, device=device
            )
        return self if dtype is None else self._cast(dtype)

    def contiguous(self, *args: Any, **kwargs: Any) -> Any:
        return self._then(self._fused, "contiguous", *args, **kwargs)

    def view(self, *shape: Any) -> Any:
        return self.reshape(*shape)

    def reshape(self, *shape: Any) -> Any:
        wanted = tuple(shape[0]) if len(shape) == 1 and not isinstance(shape[0], int) else shape
        fused = None
        if self._fused is not None and len(wanted) > 0 and wanted[-1] == self.shape[-1]:
            hidden = self._fused.hidden
            fused = self._fused.but(hidden=hidden.reshape(*wanted[:-1], hidden.shape[-1]))
        return self._then(fused, "reshape", wanted)

    def __getitem__(self, index: Any) -> Any:
        fused = None
        rows, classes = without_classes(index, self.ndim)
        if self._fused is not None and keeps_last_dimension(rows, self.ndim):
            fused = self._fused.but(hidden=self._fused.hidden[rows])
            if classes is not None:
                fused = fused.but(classes=min(classes, self.shape[-1]))
        return self._then(fused, "getitem", index)

    def __setitem__(self, index: Any, value: Any) -> None:
        self.materialize()[index] = value

    def _scaled(self, name: str, factor: Any) -> Any:
        fused = None
        if self._fused is not None and isinstance(factor, (int, float)) and factor > 0:
            by = 1 / factor if name == "div" else factor
            if self._fused.in_tanh:  # by * tanh(scale * logits) = softcap_by(by * scale * logits)
                scale = self._fused.scale * by
                fused = self._fused.but(softcap=by, scale=scale, in_tanh=False)
            elif self._fused.softcap is None:
                fused = self._fused.but(scale=self._fused.scale * by)
        return self._then(fused, name, factor)

    def __mul__(self, factor: Any) -> Any:
        return self._scaled("mul", factor)

    __rmul__ = mul = __mul__

    def __truediv__(self, factor: Any) -> Any:
        return self._scaled("div", factor)

    div = true_divide = __truediv__

    def __add__(self, other: Any) -> Any:
        """A bias over the classes becomes that of the loss: BART's and ESM's lies beside the head."""
        fused, dtype = self._fused, self.dtype
        if (
            fused is None
            or fused.in_tanh
            or fused.softcap
            or fused.classes
            or fused.bias is not None
        ):
            return self._then(None, "add", real(other))
        if not is_bias(other, self.shape, self.device):
            return self._then(None, "add", real(other))
        fused = fused.but(bias=other.flatten() / fused.scale)
        return self._then(fused, "add", other, dtype=torch.promote_types(dtype, other.dtype))

    __radd__ = __add__

    def tanh(self) -> Any:
        fused = self._fused
        if fused is not None:
            capped = fused.softcap is not None or fused.in_tanh
            fused = None if capped else fused.but(in_tanh=True)
        return self._then(fused, "tanh")

    # -- the loss ---------------------------------------------------------------------------------------------------

    def cross_entropy(
        self,
        target: Tensor,
        weight: Tensor | None = None,
        size_average: bool | None = None,
        ignore_index: int = -100,
        reduce: bool | None = None,
        reduction: str = "mean",
        label_smoothing: Any = 0.0,  # `float` is a method here
    ) -> Tensor:
        """`torch.nn.functional.cross_entropy(self, target, ...)`."""
        fused, origin = self._fused, self._origin
        plain = (weight, size_average, ignore_index, reduce, reduction, label_smoothing)
        of_classes = fused is not None and (fused.classes, fused.bias, weight) != (None,) * 3
        if (
            self._real is not None
            or fused is None
            or origin.call is None
            or fused.in_tanh
            or fused.hidden.ndim != 2
            or target.ndim != 1
            or target.is_floating_point()
            or size_average is not None
            or reduce is not None
            or origin.look_around()
            or (origin.called and heads.runs_once(origin.around))
            or not heads.is_armed(origin.around)
            or (of_classes and heads.sharded_by(origin.around) is not None)
        ):
            return F.cross_entropy(self.materialize(), target, *plain)
        arguments = {
            "ce_weight": weight,
            "ignore_index": ignore_index,
            "reduction": reduction,
            "label_smoothing": label_smoothing,
            "softcap": fused.softcap,
        }
        request = LossRequest(target, fused, arguments, origin.call.fused_loss)
        origin.called = True
        now, then = Modes.now(origin.modes.device), origin.modes
        modes = then if now == then else Modes(then.grad and now.grad, then.device, then.autocast)
        with modes.on(origin.hidden, now):
            result = heads.loss_of(origin.around, fused.hidden, request)
        if torch.compiler.is_compiling():
            origin.loss = result
        if request.refused is not None:
            origin.call.refuse(request.refused)
            # the rows are chosen already; the rest acts on each element
            for name, args, kwargs in self._chain:
                if name in _ELEMENTWISE:
                    result = _ELEMENTWISE[name](result, *args, **kwargs)
            return F.cross_entropy(result[:, : fused.classes], target, *plain)
        result = origin.call.loss(result)
        # as the loss of real logits: autocast computes it in float32
        wide = now.autocast is not None and self.dtype.itemsize < 4
        return result.to(self.device, torch.float32 if wide else self.dtype)

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.cross_entropy and "input" in kwargs:
            args = (kwargs.pop("input"), *args)
        known = _FUNCTIONS.get(func)
        if known is not None and args and isinstance(args[0], cls):
            return getattr(args[0], known)(*args[1:], **kwargs)
        return func(*real(args), **{name: real(value) for name, value in kwargs.items()})

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(f"DeferredLogits has no attribute {name!r}")
        return getattr(self.materialize(), name)

    def __repr__(self) -> str:
        return f"<logits of shape {tuple(self.shape)}, {self.dtype}, made when they are read>"


_FUNCTIONS = {
    F.cross_entropy: "cross_entropy",
    torch.tanh: "tanh",
    torch.mul: "mul",
    torch.div: "div",
    torch.true_divide: "div",
    torch.reshape: "reshape",
}


delegate(
    DeferredLogits,
    "sub rsub rtruediv pow neg abs matmul rmatmul lt le gt ge eq ne iter floordiv mod and or bool float int",
)


def _in_place(name: str) -> Callable[..., Any]:
    """`logits *= x`: recorded where no view can see it, else done to the real logits."""
    write = getattr(operator, f"i{name}")

    def method(self: DeferredLogits, other: Any) -> Any:
        if torch.compiler.is_compiling():
            return getattr(self, f"__{name}__")(other)
        is_view = self._chain and self._chain[-1][0] in _VIEWS
        if not is_view and all(one._parent is not self for one in self._origin.relatives()):
            after = getattr(self, f"__{name}__")(other)
            if type(after) is DeferredLogits and after._dtype == self._dtype:
                after._parent = copy.copy(self)
                self.__dict__.update(vars(after))
                return self
        self._real = write(self.materialize(), real(other))
        return self

    return method


_VIEWS = ("contiguous", "reshape", "getitem")
for _name in ("add", "sub", "mul", "truediv", "pow"):
    setattr(DeferredLogits, f"__i{_name}__", _in_place(_name))
